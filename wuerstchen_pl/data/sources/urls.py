"""Expands shard locations: paths, folders, brace patterns, list files and URLs."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from webdataset.shardlists import expand_urls as expand_braces

from wuerstchen_pl.io.image_files import is_hidden
from wuerstchen_pl.io.text_files import text_encoding

Urls = str | Sequence[str]
_LISTS = (".txt", ".list")
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?")
_MAX_SHARDS = 1_000_000  # per pattern; more is surely a typo


def expand_urls(urls: Urls, *, key: str, allow_pipe: bool = False) -> list[str]:
    """A list of shards: local paths, http(s) URLs and, if allowed, commands.

    Args:
        urls: a tar file, a folder of tar files, a text file that lists one location per line, a
            brace pattern, a URL, or a list of any of these.
        key: the config key that errors name.
        allow_pipe: allow "pipe:COMMAND", whose output is the shard.

    Raises:
        FileNotFoundError: a folder contains no tar file, or a home directory does not exist.
        ValueError: there is no shard, one is listed twice, or a URL is not supported.
    """
    names = _expand(urls, key, allow_pipe)
    if not names:
        raise ValueError(f"{key}={urls!r} names no shard; use a tar file, a folder or a pattern")
    if len(set(names)) < len(names):
        duplicate = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{key} names {duplicate!r} twice; remove one")
    return names


def _expand(urls: Urls, key: str, allow_pipe: bool, listed_in: Path | None = None) -> list[str]:
    names: list[str] = []
    for pattern in [urls] if isinstance(urls, str) else urls:
        reject_url(pattern, key=key, allow_pipe=allow_pipe)
        for name in _expand_braces(pattern, key):
            reject_url(name, key=key, allow_pipe=allow_pipe)  # braces may have hidden a command
            names += [name] if is_remote(name) else _expand_local(name, key, allow_pipe, listed_in)
    return names


def _expand_braces(pattern: str, key: str) -> list[str]:
    if pattern.startswith("pipe:"):  # a command may contain braces
        return [pattern]
    if _count(pattern) > _MAX_SHARDS:  # webdataset would build the whole list first
        raise ValueError(f"{key}={pattern!r} names more than a million shards; fix its braces")
    try:
        return expand_braces(pattern)
    except ValueError as error:
        raise ValueError(
            f"{key}={pattern!r} has an unbalanced brace; close or remove it"
        ) from error


def _count(pattern: str) -> int:
    """An upper bound on the number of names, from the innermost braces outwards."""

    def braces_to_count(braces: re.Match[str]) -> str:
        content = braces[1]
        if ends := _RANGE.fullmatch(content):
            first, last = (int(end) if len(end) < 12 else _MAX_SHARDS for end in ends.groups())
            return f"\0{min(abs(last - first), _MAX_SHARDS) + 1}\0"
        return f"\0{min(sum(map(_product, content.split(','))), _MAX_SHARDS + 1)}\0"

    num_replaced = 1
    while num_replaced:
        pattern, num_replaced = _INNERMOST.subn(braces_to_count, pattern)
    return _product(pattern)


def _product(part: str) -> int:
    """The product of the counts that replace the braces in a part of a pattern."""
    return math.prod(int(count) for count in part.split("\0")[1::2])


def is_remote(name: str) -> bool:
    """Whether a shard must be downloaded or produced by a command."""
    return name.startswith(("http://", "https://", "pipe:"))


def reject_url(pattern: str, *, key: str, allow_pipe: bool) -> None:
    """Reject URLs that are not supported, and commands unless allowed.

    Raises:
        ValueError: the URL is rejected.
    """
    if "\0" in pattern:
        raise ValueError(f"{key}={pattern!r} contains a NUL character; remove it")
    if pattern.startswith("pipe:"):
        if not allow_pipe:
            raise ValueError(
                f"{key}={pattern!r} would run a command on this machine; set data.allow_pipe=true "
                "if you trust it"
            )
    elif "://" in pattern and not is_remote(pattern):
        raise ValueError(
            f"{key}={pattern!r} is neither a path nor an http(s) URL; copy the shards to disk, or "
            "use 'pipe:COMMAND', whose output is the shard, with data.allow_pipe=true"
        )


def _expand_local(name: str, key: str, allow_pipe: bool, listed_in: Path | None) -> list[str]:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{key} names {name!r}, but there is no such user; fix the path"
        ) from error
    if path.is_dir():
        tars = sorted(tar for tar in path.glob("*.tar") if not is_hidden(tar.name))
        if not tars:
            raise FileNotFoundError(
                f"{key} names the folder {str(path)!r}, which contains no tar file; fix the path, "
                "or build the shards first"
            )
        return [str(tar) for tar in tars]
    if path.suffix in _LISTS and path.is_file():
        if listed_in is not None:
            raise ValueError(
                f"{key} names the list {listed_in}, which names another list, {name!r}; merge them"
            )
        # File names need not be UTF-8.
        content = path.read_bytes()
        lines = content.decode(text_encoding(content), "surrogateescape").splitlines()
        return _expand([line.strip() for line in lines if line.strip()], key, allow_pipe, path)
    # A single missing shard among many is counted when it is opened.
    return [str(path)]


def check_any_exists(names: Sequence[str], *, key: str) -> None:
    """Raise FileNotFoundError if all names are paths, and none of them exists."""
    if not any(is_remote(name) or Path(name).exists() for name in names):
        raise FileNotFoundError(
            f"{key} names {names[0]!r}, which does not exist"
            + (f", nor do the {len(names) - 1} others" if len(names) > 1 else "")
            + "; fix the path, or build the shards first"
        )
