"""The tree of errors and its exit codes are a promise to scripts."""

import pytest

from selfsup import errors
from selfsup.errors import Interrupted, SelfsupError, nearest

EXIT_CODES = {
    "SelfsupError": 1,
    "ConfigError": 2,
    "LimitError": 2,
    "DataError": 3,
    "DivergedError": 4,
    "CheckpointError": 5,
    "StorageError": 5,
}


def test_exit_codes_are_pinned():
    found = {
        name: thing.exit_code
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, SelfsupError) and thing is not Interrupted
    }
    assert found == EXIT_CODES


@pytest.mark.parametrize("name", sorted(EXIT_CODES))
def test_every_error_can_be_caught_by_the_root_and_keeps_its_message(name):
    error = getattr(errors, name)("what failed")
    assert isinstance(error, SelfsupError)
    assert str(error) == "what failed"


@pytest.mark.parametrize(("signum", "code"), [(15, 143), (2, 130)])
def test_interrupted_exits_with_128_plus_the_signal(signum, code):
    error = Interrupted("saved", signum)
    assert isinstance(error, SelfsupError)
    assert (error.exit_code, str(error)) == (code, "saved")


def test_no_error_is_another_programs():
    """An `except OSError` or `except ValueError` around a call must not swallow ours."""
    for name in EXIT_CODES.keys() - {"SelfsupError"}:
        assert getattr(errors, name).__bases__ == (SelfsupError,)
    assert Interrupted.__bases__ == (SelfsupError,)
    assert SelfsupError.__bases__ == (Exception,)


def test_nearest_names_one_or_lists_all():
    assert nearest("tempreature", ["temperature", "lr"]) == "; did you mean 'temperature'?"
    assert nearest("q", ["b", "a"]) == "; known: a, b"
