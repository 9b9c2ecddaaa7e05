"""Two configs and what is rendered of them, word for word.

`python -m tests.launch.render.golden` writes the files anew, for a look at what changed with `git diff`.
"""
