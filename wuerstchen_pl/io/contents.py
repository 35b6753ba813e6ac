"""Errors about the contents of a file name that file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InvalidContents(ValueError):
    """A file has contents that cannot be used; the message names it."""


@contextmanager
def contents_of(path: str | Path, fix: str = "use another file") -> Iterator[None]:
    """Turn an error about the contents of a file into a sentence with its path.

    Other errors in the block pass unchanged: those of the file system, and those that already name
    a file.

    Args:
        path: the file that is interpreted in the block.
        fix: what to do about it, unless the error says so.

    Raises:
        InvalidContents: if the block raises.
    """
    try:
        yield
    except (OSError, MemoryError, InvalidContents):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, KeyError):
            reason = str(error.args[0]) if " " in reason else f"it lacks {reason}"
        elif not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        if type(error) is not ValueError:  # as the package's own checks raise
            reason += f"; {fix}"
        raise InvalidContents(f"{path} cannot be used: {reason}") from error
