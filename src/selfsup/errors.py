"""Every error that selfsup raises on purpose, and the exit code that the command line gives it.

    SelfsupError
    |- ConfigError       wrong use: a key, a value, a name               exit 2
    |- DataError         bad or missing data                             exit 3
    |- DivergedError     the loss or the gradient is not finite          exit 4
    |- CheckpointError   a run folder that is damaged or not ours        exit 5
    |- StorageError      the disk is full or not writable                exit 5
    |- LimitError        a request larger than what is allowed           exit 2
    `- Interrupted       SIGTERM or SIGINT; the run is saved             exit 143 or 130

A message says what failed, what was given, what is allowed and what to do next.
"""

import difflib
from collections.abc import Iterable


class SelfsupError(Exception):
    """The root of the tree; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(SelfsupError):
    """A key, a value or a name that selfsup does not know or cannot use."""

    exit_code = 2


class LimitError(SelfsupError):
    """A request that is larger than what is allowed."""

    exit_code = 2


class DataError(SelfsupError):
    """A file that cannot be read, or whose content is not what was asked for."""

    exit_code = 3


class DivergedError(SelfsupError):
    """The loss or the gradient stopped being finite; the weights were left unchanged."""

    exit_code = 4


class CheckpointError(SelfsupError):
    """A run folder or a checkpoint that is damaged, or that another program wrote."""

    exit_code = 5


class StorageError(SelfsupError):
    """The disk is full, or the folder cannot be written."""

    exit_code = 5


class Interrupted(SelfsupError):
    """A signal stopped the run after it had been saved; `--resume` goes on.

    Args:
        message: where the run was saved and how to go on.
        signum: the number of the signal; the exit code is 128 + signum.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[type, tuple[str, int]]:  # a worker process sends it to its parent
        return type(self), (str(self), self.exit_code - 128)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for an unknown word: `; did you mean 'x'?`, or the list of what is known.

    >>> nearest("mask_rat", ["mask_rate", "lr"])
    "; did you mean 'mask_rate'?"
    >>> nearest("zzz", ["mask_rate", "lr"])
    '; known: lr, mask_rate'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
