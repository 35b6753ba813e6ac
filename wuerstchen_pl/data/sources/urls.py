"""Where shards are: paths, folders, brace patterns, lists, and addresses on the web."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

Urls = str | Sequence[str]
_LISTS = (".txt", ".list")
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?")
_MOST = 1_000_000  # shards of a pattern: one that gives more is a slip


def expand_urls(urls: Urls, *, key: str, allow_pipe: bool = False) -> list[str]:
    """Expand to the names of tar files: local paths, http(s) addresses and, if allowed, commands.

    Args:
        urls: a tar file, a folder of them, a file with one of these in each line, a brace pattern,
            an address, or a list of any of these.
        key: the configuration key that errors name.
        allow_pipe: take "pipe:COMMAND", whose output is the shard.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no tar file.
        ValueError: nothing is given, or an address is neither local nor http(s).
    """
    names = _names(urls, key, allow_pipe)
    if not names:
        raise ValueError(f"{key}={urls!r} names no shard: give a tar file, a folder or a pattern.")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{key} names {twice!r} twice: remove one.")
    return names


def _names(urls: Urls, key: str, allow_pipe: bool, listed_in: Path | None = None) -> list[str]:
    names: list[str] = []
    for pattern in [urls] if isinstance(urls, str) else urls:
        reject_url(pattern, key=key, allow_pipe=allow_pipe)
        for name in _without_braces(pattern, key):
            reject_url(name, key=key, allow_pipe=allow_pipe)  # what the braces may have hidden
            names += [name] if is_remote(name) else _local(name, key, allow_pipe, listed_in)
    return names


def _without_braces(pattern: str, key: str) -> list[str]:
    if pattern.startswith("pipe:"):  # a command may have braces of its own
        return [pattern]
    if _count(pattern) > _MOST:  # braceexpand would list them all before it gives the first
        raise ValueError(f"{key}={pattern!r} names more than {_MOST:,} shards: fix its braces.")
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"{key}={pattern!r} has a brace without its other: fix it.") from error


def _count(pattern: str) -> int:
    """How many names braces give, at most; from the innermost ones outwards."""

    def counted(braces: re.Match[str]) -> str:
        content = braces[1]
        if ends := _RANGE.fullmatch(content):
            first, last = (int(end) if len(end) < 12 else _MOST for end in ends.groups())
            return f"\0{min(abs(last - first), _MOST) + 1}\0"
        return f"\0{min(sum(map(_product, content.split(','))), _MOST + 1)}\0"

    found = 1
    while found:
        pattern, found = _INNERMOST.subn(counted, pattern)
    return _product(pattern)


def _product(part: str) -> int:
    """The product of the counts that are in a part in place of braces."""
    return math.prod(int(count) for count in part.split("\0")[1::2])


def is_remote(name: str) -> bool:
    """Whether a shard has to be brought here first."""
    return name.startswith(("http://", "https://", "pipe:"))


def reject_url(pattern: str, *, key: str, allow_pipe: bool) -> None:
    """Refuse what would run a command unasked, and addresses that cannot be read.

    Raises:
        ValueError: naming the address.
    """
    if "\0" in pattern:
        raise ValueError(f"{key}={pattern!r} holds a NUL character, and no name does: remove it.")
    if pattern.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(
                f"{key}={pattern!r} would run a command on this machine: set data.allow_pipe=true "
                "if it is yours."
            )
    elif "://" in pattern and not is_remote(pattern):
        raise ValueError(
            f"{key}={pattern!r} is neither a path nor http(s): copy the shards to a disk, or give "
            "'pipe:COMMAND', which writes one to its output, with data.allow_pipe=true."
        )


def _local(name: str, key: str, allow_pipe: bool, listed_in: Path | None) -> list[str]:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{key} names {name!r}, and there is no such user.") from error
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if not tars:
            raise FileNotFoundError(
                f"{key} names the folder {str(path)!r}, where there is no tar file: correct the "
                "path or build the shards first."
            )
        return [str(tar) for tar in tars]
    if path.suffix in _LISTS and path.is_file():
        if listed_in is not None:
            raise ValueError(
                f"{key}: the list {listed_in} names another list, {name!r}: join them."
            )
        # names of files need not be UTF-8
        lines = path.read_text("utf-8", errors="surrogateescape").splitlines()
        return _names([line.strip() for line in lines if line.strip()], key, allow_pipe, path)
    # A single absent shard among many is counted when its epoch comes.
    return [str(path)]


def check_any_exists(names: Sequence[str], *, key: str) -> None:
    """Raise FileNotFoundError if all names are paths, and none of them exists."""
    if not any(is_remote(name) or Path(name).exists() for name in names):
        raise FileNotFoundError(
            f"{key} names {names[0]!r}, which does not exist"
            + (f", nor do the {len(names) - 1} others" if len(names) > 1 else "")
            + ": correct the path or build the shards first."
        )
