"""Runs several Python modules one after the other in one process, which imports JAX once.

python -m tools.study.in_turn '[["MODULE", "--flag=value", ...], ...]'

A module that fails ends the process with its status.
"""

import json
import runpy
import sys


def main(argv: list[str]) -> None:
    for module, *flags in json.loads(argv[0]):
        sys.argv[1:] = flags
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main(sys.argv[1:])
