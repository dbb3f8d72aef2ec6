"""What the command lines do where their output cannot be written."""

from __future__ import annotations

import errno
import os
import sys
from typing import NoReturn


def give_up(error: OSError) -> NoReturn:
    """End the program where its reader has enough, or the disk is full. Raises any other error."""
    enough = isinstance(error, BrokenPipeError)
    if not enough and error.errno != errno.ENOSPC:
        raise error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at exit
    sys.exit(1 if enough else f"cannot write: {error.strerror}")
