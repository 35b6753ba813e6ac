"""Local and remote shards, intact and damaged."""

import io
import math
import os
import pickle
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset

from tests.data.factories import encode, image, sample, shards, write
from tests.data.serving import Server, serve
from wuerstchen_pl.data.sources import download_cache, manifest, urls
from wuerstchen_pl.data.sources.download_cache import DownloadCache
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Sample, ShardIndex, unit_hash
from wuerstchen_pl.data.sources.tar import index_tar
from wuerstchen_pl.data.sources.urls import expand_urls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "00000.tar", sample("000000000", 30, 20) | sample("000000001", 10, 40))
    write(tmp_path / "00001.tar", sample("000010000", 16, 16))
    return tmp_path


def opened(source: ShardSource) -> list[ShardIndex]:
    return [source.open(name) for group in source.groups("train") for name in group.shards]


def reasons(index: ShardIndex) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for bad in index.bad:
        counts[bad.reason] += bad.count
    return dict(counts)


# Intact


def test_bytes_and_captions_match_webdataset(folder: Path) -> None:
    source = ShardSource(urls=str(folder / "{00000..00001}.tar"))
    ours = [s for index in opened(source) for s in index.samples]
    names = [str(folder / f"0000{i}.tar") for i in range(2)]
    theirs = list(webdataset.WebDataset(names, shardshuffle=False))
    assert [s.key for s in ours] == [t["__key__"] for t in theirs]
    assert [s.captions[0].encode() for s in ours] == [t["txt"] for t in theirs]
    assert [source.read(s) for s in ours] == [t["jpg"] for t in theirs]
    assert [(s.width, s.height) for s in ours] == [(30, 20), (10, 40), (16, 16)]


def test_folder_pattern_list_and_list_file_are_equivalent(folder: Path) -> None:
    listed = [str(folder / "00000.tar"), str(folder / "00001.tar")]
    (folder / "all.txt").write_text("\n".join(listed) + "\n\n")
    variants = [str(folder), str(folder / "{00000..00001}.tar"), listed, str(folder / "all.txt")]
    assert [expand_urls(urls, key="data.urls") for urls in variants] == [listed] * 4


def test_size_without_json_follows_the_exif_orientation(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(Image.new("RGB", (30, 20)), exif=exif)
    path = write(tmp_path / "s.tar", {"a.jpg": turned, "a.txt": b"turned"})
    indexed = index_tar(str(path), "s").samples[0]
    assert (indexed.width, indexed.height) == (20, 30)


def test_only_scores_are_read_from_the_metadata(tmp_path: Path) -> None:
    members = sample("a", pwatermark=0.25, AESTHETIC_SCORE=5, punsafe=None, similarity=0.3)
    indexed = index_tar(str(write(tmp_path / "s.tar", members)), "s").samples[0]
    assert indexed.metadata == {"pwatermark": 0.25, "AESTHETIC_SCORE": 5.0}


def test_source_reads_the_same_after_pickling(folder: Path) -> None:
    source = ShardSource(urls=str(folder))
    samples = [s for index in opened(source) for s in index.samples]
    before = [source.read(s) for s in samples]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(s) for s in samples] == before


# Damaged


def test_incomplete_samples_are_skipped_and_counted(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for key in "abcdef":
        members |= sample(key)
    del members["b.txt"], members["c.jpg"], members["d.json"]
    members["d.jpg"] = b"no image"
    members["e.txt"] = b"caf\xe9"
    members["f.json"] = b"{broken"  # its size is read from the image instead
    index = index_tar(str(write(tmp_path / "s.tar", members)), "s")
    assert [s.key for s in index.samples] == ["a", "f"]
    assert reasons(index) == {
        "no caption": 1,
        "no image": 1,
        "unreadable image": 1,
        "caption is not UTF-8": 1,
    }
    assert not index.broken


@pytest.mark.parametrize(
    ("damage", "left", "expected"),
    [
        ("header", 1, {"damaged shard": 1, "lost samples": 3}),
        ("cut", 1, {"damaged shard": 1, "no caption": 1, "lost samples": 2}),
        ("cut at a header", 1, {"damaged shard": 1, "lost samples": 3}),
        ("empty", 0, {"damaged shard": 1, "lost samples": 4}),
        ("garbage", 0, {"damaged shard": 1, "lost samples": 4}),
        ("absent", 0, {"unreadable shard": 4}),
    ],
)
def test_a_damaged_shard_yields_its_readable_samples_and_reports_the_rest(
    tmp_path: Path, damage: str, left: int, expected: dict[str, int]
) -> None:
    members: dict[str, bytes] = {}
    for key in "abcd":
        members |= sample(key)
    path = write(tmp_path / "00000.tar", members)
    manifest.write(tmp_path, [manifest.entry_of(path, 4)])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        fourth, fifth = (tar.getmembers()[i].offset for i in (3, 4))
    if damage == "header":
        data[fourth : fourth + 512] = b"x" * 512
    elif damage == "cut":
        del data[fifth + 512 + 3 :]  # within the caption of the second sample
    elif damage == "cut at a header":
        del data[fourth + 100 :]
    else:
        data = bytearray({"garbage": b"\x07" * 5000}.get(damage, b""))
    path.unlink() if damage == "absent" else path.write_bytes(data)
    (index,) = opened(ShardSource(urls=str(path)))
    assert len(index.samples) == left
    assert reasons(index) == expected
    assert index.broken


def test_headers_that_seek_back_stop_the_indexing(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tar", sample("a") | sample("b"))
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[3]
        back = tarfile.TarInfo(fourth.name)
        back.size = -fourth.offset - tarfile.BLOCKSIZE  # as if the next one were the first
        header = back.tobuf(tarfile.GNU_FORMAT)
    data = bytearray(path.read_bytes())
    data[fourth.offset : fourth.offset + len(header)] = header
    path.write_bytes(data)
    index = index_tar(str(path), "s")
    assert [s.key for s in index.samples] == ["a"]
    assert reasons(index) == {"damaged shard": 1}


@pytest.mark.parametrize("kind", ["long name", "sparse"])
def test_headers_beyond_the_end_stop_the_indexing(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "s.tar", sample("a"))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + tarfile.BLOCKSIZE
    more = tarfile.TarInfo("b.txt")
    more.size = 2**50 if kind == "long name" else 0
    more.type = tarfile.GNUTYPE_LONGNAME if kind == "long name" else tarfile.GNUTYPE_SPARSE
    header = bytearray(more.tobuf(tarfile.GNU_FORMAT))
    if kind == "sparse":
        header[482] = 1  # its sparse map continues in a missing block
        header[148:156] = b"%06o\0 " % tarfile.calc_chksums(header[:512])[0]
    path.write_bytes(data[:end] + header)
    index = index_tar(str(path), "s")
    assert [s.key for s in index.samples] == ["a"]
    assert reasons(index) == {"damaged shard": 1}


def test_an_invalid_manifest_and_a_nul_character_do_not_raise(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tar", sample("a"))
    (tmp_path / "shards.json").write_text("[" * 200_000)
    assert len(ShardSource(urls=str(tmp_path)).open(str(path)).samples) == 1
    assert reasons(index_tar("a\0b.tar", "s")) == {"unreadable shard": 1}


def test_invalid_unicode_in_names_and_captions_does_not_raise(tmp_path: Path) -> None:
    half = sample("half", captions=["whole", "half \ud800"], pwatermark=math.nan, punsafe=1e400)
    none = sample("none", captions=["half \udc00"])
    name = "caf\udce9"  # a byte that is not UTF-8
    members = half | none | {name + k[1:]: v for k, v in sample("x").items()}
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, data in members.items():
            entry = tarfile.TarInfo(key)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    index = index_tar(str(path), "s")
    assert [s.captions for s in index.samples] == [
        *(("whole",), ("an image of none",), ("an image of x",)),
    ]
    assert [s.metadata for s in index.samples] == [{}, {}, {}]
    assert len({unit_hash(s.identity) for s in index.samples}) == 3


def test_a_repeated_member_name_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for key, data in [*sample("a").items(), ("a.txt", b"another caption")]:
            entry = tarfile.TarInfo(key)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    index = index_tar(str(path), "s")
    assert [s.captions for s in index.samples] == [("another caption",)]
    assert reasons(index) == {"repeated name": 1}


def test_samples_missing_from_an_intact_shard_are_counted(
    folder: Path,
) -> None:
    path = folder / "00000.tar"
    manifest.write(folder, [{**manifest.entry_of(path, 2), "samples": 5}])
    assert reasons(ShardSource(urls=str(folder)).open(str(path))) == {"lost samples": 3}


def test_reading_a_truncated_image_raises_an_os_error(folder: Path) -> None:
    source = ShardSource(urls=str(folder / "00000.tar"))
    first, second = source.open(str(folder / "00000.tar")).samples
    data = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(data[: second.offset + 4])
    assert source.read(first)
    with pytest.raises(OSError, match="was truncated after"):
        source.read(second)


# URLs


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
    with pytest.raises(ValueError, match=r"names more than 1,000,000 shards; fix its braces"):
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
    (index,) = opened(ShardSource(urls=str(tmp_path / "all.txt")))
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


# Remote shards


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    yield from serve(folder)


def remote(server: Server, tmp_path: Path, **changes: Any) -> ShardSource:
    source = ShardSource(
        urls=server.url + "/{00000..00001}.tar", download_dir=str(tmp_path / "down")
    )
    source.download_cache = DownloadCache(
        **{"folder": str(tmp_path / "down"), "keep_bytes": 10**9, "wait": 0.01} | changes
    )
    return source


def test_remote_shards_match_local_ones_and_are_downloaded_once(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    local, web = ShardSource(urls=str(folder)), remote(server, tmp_path)
    for local_index, web_index in zip(opened(local), opened(web), strict=True):
        assert [s.key for s in local_index.samples] == [s.key for s in web_index.samples]
        for ours, fetched in zip(local_index.samples, web_index.samples, strict=True):
            assert local.read(ours) == web.read(fetched)
    assert sorted(server.requested) == ["/00000.tar", "/00001.tar"]
    opened(remote(server, tmp_path))
    assert len(server.requested) == 2


def test_temporary_server_errors_are_retried(server: Server, tmp_path: Path) -> None:
    server.failures = 3
    assert len(opened(remote(server, tmp_path))[0].samples) == 2
    assert len(server.requested) == 3 + 2


def test_an_interrupted_download_resumes(server: Server, folder: Path, tmp_path: Path) -> None:
    server.break_after = 4000
    source = remote(server, tmp_path, attempts=20)
    (first, _) = opened(source)
    assert len(first.samples) == 2
    assert first.samples[0].size == len(source.read(first.samples[0]))
    size = (folder / "00000.tar").stat().st_size
    assert server.requested.count("/00000.tar") == -(-size // 4000)


@pytest.mark.parametrize("kind", ["404", "dead", "unreachable"])
def test_unreachable_shards_are_skipped_and_reported(
    server: Server, tmp_path: Path, kind: str
) -> None:
    source = remote(server, tmp_path, attempts=3)
    name = server.url + ("/no.tar" if kind == "404" else "/00000.tar")
    server.break_after = 10 if kind == "dead" else None
    if kind == "unreachable":
        server.shutdown()
        server.server_close()
    start = time.monotonic()
    index = source.open(name)
    assert time.monotonic() - start < 20
    assert index.broken
    assert reasons(index) == {"unreachable shard": 1}
    assert name in index.bad[0].where
    assert server.requested.count("/no.tar") == (kind == "404")  # a retry would not help
    assert [p.suffix for p in (tmp_path / "down").iterdir()] == [".lock"]


def test_the_oldest_downloads_are_evicted_and_downloaded_again(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    source = remote(server, tmp_path, keep_bytes=(folder / "00000.tar").stat().st_size)
    first, second = opened(source)
    assert len(list((tmp_path / "down").glob("*.tar"))) == 1
    assert source.read(second.samples[0]) == image("000010000", 16, 16)
    assert source.read(first.samples[0]) == image("000000000", 30, 20)
    assert len(server.requested) == 3


def test_other_tar_files_in_the_download_folder_are_kept(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "down").mkdir()
    (tmp_path / "down/mine.tar").write_bytes(b"precious")
    opened(remote(server, tmp_path, keep_bytes=(folder / "00000.tar").stat().st_size))
    assert len(list((tmp_path / "down").glob("*.tar"))) == 2
    assert (tmp_path / "down/mine.tar").read_bytes() == b"precious"


def test_an_interrupted_download_without_content_length_is_retried(
    server: Server, tmp_path: Path
) -> None:
    server.break_after, server.sends_length = 4000, False
    (first, _) = opened(remote(server, tmp_path, attempts=20))
    assert len(first.samples) == 2


def test_a_too_large_download_is_aborted_and_not_retried(server: Server, tmp_path: Path) -> None:
    index = remote(server, tmp_path, keep_bytes=5000).open(server.url + "/00000.tar")
    assert "larger than data.download_gb" in index.bad[0].where
    assert server.requested == ["/00000.tar"]
    assert not list((tmp_path / "down").glob("*.partial"))


def test_a_too_slow_download_is_aborted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_cache, "_TIMEOUT", 0.3)
    server.trickle = 0.05
    index = remote(server, tmp_path, attempts=2).open(server.url + "/00000.tar")
    assert "too slow" in index.bad[0].where


def test_a_worker_forked_during_a_download_does_not_keep_the_lock(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, children = remote(server, tmp_path), []

    def fork_and_fail(url: str, target: Path) -> None:
        children.append(os.fork())
        if not children[0]:
            time.sleep(30)
            os._exit(0)
        raise OSError("later")

    fetch_to = source.download_cache._fetch_to
    monkeypatch.setattr(source.download_cache, "_fetch_to", fork_and_fail)
    try:
        assert source.open(server.url + "/00000.tar").broken
        monkeypatch.setattr(source.download_cache, "_fetch_to", fetch_to)
        start = time.monotonic()
        assert len(source.open(server.url + "/00000.tar").samples) == 2
        assert time.monotonic() - start < 10
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_an_allowed_command_writes_a_shard(folder: Path, tmp_path: Path) -> None:
    source = ShardSource(
        urls=[f"pipe:cat {folder / '00000.tar'}", "pipe:echo broken >&2; exit 3"],
        allow_pipe=True,
        download_dir=str(tmp_path / "down"),
    )
    good, bad = opened(source)
    assert source.read(good.samples[0]) == image("000000000", 30, 20)
    assert "failed with status 3: broken" in bad.bad[0].where


def test_shards_helper_returns_the_written_keys(tmp_path: Path) -> None:
    keys = shards(tmp_path / "many", 3, 4)
    indexes = opened(ShardSource(urls=str(tmp_path / "many")))
    assert [s.key for index in indexes for s in index.samples] == keys
