"""Patterns, lists and folders of shards are expanded; invalid and dangerous ones are rejected."""

import os
from pathlib import Path

import pytest

from tests.data.factories import sample, write
from tests.data.sources.reading import open_all
from wuerstchen_pl.data.sources import urls
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Sample
from wuerstchen_pl.data.sources.urls import expand_urls


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:cat x.tar", r"urls='pipe:cat x\.tar' would run a command"),
        ("s3://bucket/x.tar", "is neither a path nor an http"),
        ("gs://bucket/{0..3}.tar", "is neither a path nor an http"),
        ("file://host/x.tar", "is neither a path nor an http"),
    ],
)
def test_unsupported_urls_are_rejected_before_reading(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardSource(urls=["/nowhere/a.tar", url])


@pytest.mark.parametrize(
    "line", ["pipe:touch {ran}", "{{pipe:touch {ran},x.tar}}", "{list}", "{{{list},x.tar}}"]
)
def test_a_list_file_cannot_inject_a_command(tmp_path: Path, line: str) -> None:
    ran, other = tmp_path / "ran", tmp_path / "other.txt"
    other.write_text(f"pipe:touch {ran}\n")
    (tmp_path / "all.txt").write_text(line.format(ran=ran, list=other) + "\n")
    with pytest.raises(ValueError, match=r"would run a command|names another list"):
        ShardSource(urls=str(tmp_path / "all.txt")).prepare()
    assert not ran.exists()


def test_a_command_from_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    source = ShardSource(urls=str(tmp_path), download_dir=str(tmp_path / "down"))
    untrusted = Sample("a", ("a",), 1, 1, f"pipe:touch {tmp_path / 'ran'}")
    with pytest.raises(OSError, match="would run a command"):
        source.read(untrusted)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "braces",
    [
        "{0..9999999999}",
        f"{{0..{'9' * 5000}}}",
        "{a,b}" * 30,
        "{0..999}" * 3,
        f"{{{'{a,b}' * 30},c}}",
        "{{0..999}{0..999},x}{a,b}",
        f"{'{a,' * 30}{{0..999999}}{'}' * 30}",
    ],
    ids=range(7),
)
def test_too_many_names_from_braces_are_rejected(tmp_path: Path, braces: str) -> None:
    with pytest.raises(ValueError, match=r"names more than a million shards; fix its braces"):
        ShardSource(urls=f"{tmp_path}/{braces}.tar").prepare()


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        *(("a.tar", 1), ("{0..9}.tar", 10), ("{00..08..4}{a,b}", 6), ("{{0..4},{8..9}}.tar", 7)),
        *(("{a,{b,c}{d,e}}x", 5), ("{}", 1), ("{9..0}", 10)),
    ],
)
def test_the_count_of_names_is_an_upper_bound(tmp_path: Path, pattern: str, count: int) -> None:
    assert len(expand_urls(f"{tmp_path}/{pattern}", key="data.urls")) == count
    assert urls._count(pattern) >= count


def test_lists_with_invalid_paths_are_rejected(tmp_path: Path) -> None:
    for text, message in (
        (b"a\0b.tar", "contains a NUL character"),
        (b"~nosuchuser/x.tar", "there is no such user"),
        (b"{a,b.tar", "has an unbalanced brace"),
    ):
        (tmp_path / "all.txt").write_bytes(text)
        with pytest.raises((ValueError, FileNotFoundError), match=rf"data\.urls.*{message}"):
            ShardSource(urls=str(tmp_path / "all.txt")).prepare()
    name = b"caf\xe9.tar"
    (tmp_path / "all.txt").write_bytes(bytes(tmp_path) + b"/" + name)
    write(tmp_path / "s.tar", sample("a")).rename(tmp_path / os.fsdecode(name))
    (index,) = open_all(ShardSource(urls=str(tmp_path / "all.txt")))
    assert [s.key for s in index.samples] == ["a"]


def test_missing_empty_and_repeated_shards_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.urls names '.*0\.tar'.*nor do the 2 other"):
        ShardSource(urls=str(tmp_path / "{0..2}.tar")).prepare()
    with pytest.raises(FileNotFoundError, match="no tar file"):
        ShardSource(urls=str(tmp_path)).prepare()
    with pytest.raises(ValueError, match="names no shard"):
        ShardSource(urls=[]).prepare()
    write(tmp_path / "s.tar", sample("a"))
    with pytest.raises(ValueError, match=r"data\.urls names '.*s\.tar' twice"):
        ShardSource(urls=[str(tmp_path), str(tmp_path / "s.tar")]).prepare()
