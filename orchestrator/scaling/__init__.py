"""Reports of workers go in, wanted numbers of workers come out, each with a sentence that says why."""
