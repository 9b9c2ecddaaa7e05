"""`vllm bench serve`, by its module: its command asks for the metadata of a package that CPU builds lack.

python vllm_bench.py OPTIONS...
"""

from __future__ import annotations

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    options = FlexibleArgumentParser()
    add_cli_args(options)
    main(options.parse_args())
