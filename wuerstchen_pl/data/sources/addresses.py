"""Where shards are: paths, folders, brace patterns, lists, and addresses on the web."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

Urls = str | Sequence[str]
_LISTS = (".txt", ".list")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_MOST = 1_000_000  # shards of a pattern: one that gives more is a slip


def expand(urls: Urls, *, key: str, allow_pipe: bool = False) -> list[str]:
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
    patterns = [urls] if isinstance(urls, str) else list(urls)
    names: list[str] = []
    for pattern in patterns:
        refuse_foreign(pattern, key=key, allow_pipe=allow_pipe)
        for name in _without_braces(pattern, key):
            refuse_foreign(name, key=key, allow_pipe=allow_pipe)  # what the braces may have hidden
            names += [name] if is_remote(name) else _local(Path(name).expanduser(), key, allow_pipe)
    if not names:
        raise ValueError(f"{key}={urls!r} names no shard: give a tar file, a folder or a pattern.")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{key} names {twice!r} twice: remove one.")
    return names


def _without_braces(pattern: str, key: str) -> list[str]:
    if pattern.startswith("pipe:"):  # a command may have braces of its own
        return [pattern]
    # braceexpand lists a range before it gives its first number
    longest = max((abs(int(b) - int(a)) for a, b in _RANGE.findall(pattern)), default=0)
    names = list(islice(braceexpand(pattern), _MOST + 1)) if longest <= _MOST else []
    if longest > _MOST or len(names) > _MOST:
        raise ValueError(f"{key}={pattern!r} names more than {_MOST:,} shards: mend its braces.")
    return names


def is_remote(name: str) -> bool:
    """Whether a shard has to be brought here first."""
    return name.startswith(("http://", "https://", "pipe:"))


def refuse_foreign(pattern: str, *, key: str, allow_pipe: bool) -> None:
    """Refuse what would run a command unasked, and addresses that cannot be read.

    Raises:
        ValueError: naming the address.
    """
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


def _local(path: Path, key: str, allow_pipe: bool) -> list[str]:
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if not tars:
            raise FileNotFoundError(
                f"{key} names the folder {str(path)!r}, where there is no tar file: correct the "
                "path or build the shards first."
            )
        return [str(tar) for tar in tars]
    if path.suffix in _LISTS and path.is_file():
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        if nested := next((line for line in lines if line.endswith(_LISTS)), None):
            raise ValueError(f"{key}: the list {path} names another list, {nested!r}: join them.")
        return expand([line for line in lines if line], key=key, allow_pipe=allow_pipe)
    # A single absent shard among many is counted when its turn comes.
    return [str(path)]


def check_any_exists(names: Sequence[str], *, key: str) -> None:
    """Raise FileNotFoundError if all names are paths, and none of them exists."""
    if not any(is_remote(name) or Path(name).exists() for name in names):
        raise FileNotFoundError(
            f"{key} names {names[0]!r}, which does not exist"
            + (f", nor do the {len(names) - 1} others" if len(names) > 1 else "")
            + ": correct the path or build the shards first."
        )
