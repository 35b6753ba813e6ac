"""Remote shards: downloads, retries, eviction and locks."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.data.factories import image
from tests.data.serving import Server, serve
from tests.data.sources.reading import open_all, reasons
from wuerstchen_pl.data.sources import download_cache
from wuerstchen_pl.data.sources.download_cache import DownloadCache
from wuerstchen_pl.data.sources.shards import ShardSource


@pytest.fixture
def server(shard_folder: Path) -> Iterator[Server]:
    yield from serve(shard_folder)


def remote(server: Server, tmp_path: Path, **changes: Any) -> ShardSource:
    source = ShardSource(
        urls=server.url + "/{00000..00001}.tar", download_dir=str(tmp_path / "down")
    )
    source.download_cache = DownloadCache(
        **{"folder": str(tmp_path / "down"), "keep_bytes": 10**9, "wait": 0.01} | changes
    )
    return source


def test_remote_shards_match_local_ones_and_are_downloaded_once(
    server: Server, shard_folder: Path, tmp_path: Path
) -> None:
    local, web = ShardSource(urls=str(shard_folder)), remote(server, tmp_path)
    for local_index, web_index in zip(open_all(local), open_all(web), strict=True):
        assert [s.key for s in local_index.samples] == [s.key for s in web_index.samples]
        for local_sample, web_sample in zip(local_index.samples, web_index.samples, strict=True):
            assert local.read(local_sample) == web.read(web_sample)
    assert sorted(server.requested) == ["/00000.tar", "/00001.tar"]
    open_all(remote(server, tmp_path))
    assert len(server.requested) == 2


def test_temporary_server_errors_are_retried(server: Server, tmp_path: Path) -> None:
    server.failures = 3
    assert len(open_all(remote(server, tmp_path))[0].samples) == 2
    assert len(server.requested) == 3 + 2


def test_an_interrupted_download_resumes(
    server: Server, shard_folder: Path, tmp_path: Path
) -> None:
    server.break_after = 4000
    source = remote(server, tmp_path, attempts=20)
    (first, _) = open_all(source)
    assert len(first.samples) == 2
    assert first.samples[0].size == len(source.read(first.samples[0]))
    size = (shard_folder / "00000.tar").stat().st_size
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
    server: Server, shard_folder: Path, tmp_path: Path
) -> None:
    source = remote(server, tmp_path, keep_bytes=(shard_folder / "00000.tar").stat().st_size)
    first, second = open_all(source)
    assert len(list((tmp_path / "down").glob("*.tar"))) == 1
    assert source.read(second.samples[0]) == image("000010000", 16, 16)
    assert source.read(first.samples[0]) == image("000000000", 30, 20)
    assert len(server.requested) == 3


def test_other_tar_files_in_the_download_folder_are_kept(
    server: Server, shard_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "down").mkdir()
    (tmp_path / "down/mine.tar").write_bytes(b"precious")
    open_all(remote(server, tmp_path, keep_bytes=(shard_folder / "00000.tar").stat().st_size))
    assert len(list((tmp_path / "down").glob("*.tar"))) == 2
    assert (tmp_path / "down/mine.tar").read_bytes() == b"precious"


def test_an_interrupted_download_without_content_length_is_retried(
    server: Server, tmp_path: Path
) -> None:
    server.break_after, server.sends_length = 4000, False
    (first, _) = open_all(remote(server, tmp_path, attempts=20))
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
