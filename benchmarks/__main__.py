"""The command line: ``python -m benchmarks run`` measures, ``python -m benchmarks tasks NAME`` trains; see --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from benchmarks import commands as suite
from benchmarks import extras
from benchmarks.tasks import commands as tasks


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows what there is)\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; exit status 2 where the arguments are bad, 1 where a package is missing."""
    parser = Parser(prog="python -m benchmarks", description="Training runs and measurements of fastcells.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    suite.add(commands)
    tasks.add(commands)
    arguments = parser.parse_args(argv)
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        said = extras.hint(error)
        if said is None:
            raise
        sys.exit(said)
    except OSError as error:
        from fastcells.terminal import give_up

        give_up(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
