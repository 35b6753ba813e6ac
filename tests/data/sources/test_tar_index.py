"""The index of a tar file lists what a scan lists, and one that is stale or invalid is not used."""

import io
import json
import logging
import multiprocessing
import os
import pickle
import random
import tarfile
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.data.factories import SHAPES, image, sample, shards, write
from tests.data.serving import Server, serve
from wuerstchen_pl.data.build import build
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.sources import manifest, tar_index
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.mix import Mix
from wuerstchen_pl.data.sources.openmoji import OpenMoji
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import ShardIndex, Source
from wuerstchen_pl.data.sources.tar import scan_tar
from wuerstchen_pl.data.sources.tar_index import index_path, index_tar


def random_members(rng: random.Random) -> list[tuple[str, bytes]]:
    """Members of up to ten samples; some are incomplete, invalid or repeated."""
    members: list[tuple[str, bytes]] = []
    for number in range(rng.randrange(10)):
        key = rng.choice(("a", "éclair", "日本 語", "caf\udce9", 'quote"\\', "tab\t")) + str(number)
        width, height = rng.choice(SHAPES)
        captions = rng.choices(["one", " zwei ü", "三", "half \ud800", 4], k=rng.randrange(3))
        scores = {"pwatermark": rng.random(), "AESTHETIC_SCORE": rng.choice([5, "6", None, 1e400])}
        fields: dict[str, Any] = rng.choice([{}, scores, scores | {"width": width, "height": 9}])
        text = rng.choice([b"", b"caf\xe9", b"a cat", " ☃ 🐈 ".encode(), b"line\nbreak \0"])
        data = {
            "jpg": rng.choice([image(key.encode(errors="replace").decode(), width, height), b"x"]),
            "txt": text,
            "json": rng.choice([json.dumps(fields | {"captions": captions}).encode(), b"{"]),
        }
        members += [(f"{key}.{kind}", data[kind]) for kind in data if rng.random() < 0.9]
    return members + rng.sample(members, k=min(len(members), rng.randrange(2)))


def write_random(path: Path, seed: int) -> Path:
    rng = random.Random(seed)
    with tarfile.open(
        path, "w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    ) as tar:
        for name, data in random_members(rng):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def forbid_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(path: str, shard: str) -> ShardIndex:
        raise AssertionError(f"{path} was scanned")

    monkeypatch.setattr(tar_index, "scan_tar", scan)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    members = sample("a", punsafe=0.5) | sample("b") | sample("c")
    del members["c.jpg"]
    return write(tmp_path / "s.tar", members)


# Equal to a scan; compared by repr, in which 5 and 5.0 differ


@pytest.mark.parametrize("seed", range(40))
def test_an_index_lists_what_a_scan_lists(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_random(tmp_path / "s.tar", seed)
    scanned = scan_tar(str(path), "shard")
    assert repr(index_tar(str(path), "shard")) == repr(scanned)
    forbid_scans(monkeypatch)
    assert repr(index_tar(str(path), "shard")) == repr(scanned)


def test_the_name_and_the_manifest_of_a_shard_are_not_in_its_index(
    tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_tar(str(tar), "one", expected=3)
    forbid_scans(monkeypatch)
    assert [s.name for s in index_tar(str(tar), "two").samples] == ["two/a", "two/b"]
    (incomplete, lost) = index_tar(str(tar), "two", expected=5).bad
    assert (incomplete.where, lost.count) == ("two/c.txt", 2)


def shard_source(folder: Path) -> Source:
    for seed in range(6):
        write_random(folder / f"{seed:05d}.tar", seed)
    (folder / "more").mkdir()
    shards(folder / "more", 3, 7)
    manifest.write(folder / "more", [manifest.entry_of(folder / "more/00001.tar", 9)])
    return ShardSource(urls=[str(folder), str(folder / "more")])


def openmoji_source(folder: Path) -> Source:
    source = OpenMoji(root=str(folder), image_size=32, limit=40)
    source.prepare()
    return source


def mix_source(folder: Path) -> Source:
    return Mix(sources={"a": openmoji_source(folder), "b": shard_source(folder)})


@pytest.mark.parametrize("make", [shard_source, openmoji_source, mix_source])
def test_batches_with_and_without_an_index_are_equal(
    tmp_path: Path, make: Callable[[Path], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path)

    def batches() -> list[str]:
        module = ImageTextDataModule(
            source=source,
            image_size=32,
            bucket_multiple=8,
            batch_size=3,
            val_fraction=0.1,
            shuffle_samples=8,
            max_bad_fraction=1.0,
            filters=Filters(min_words=1, deduplicate=True),
        )
        module.setup()
        order = module.train_dataloader().batches
        specs = [repr(spec) for spec in islice(order, 60)]
        module.teardown()
        return [*specs, repr(order.stats.counts), repr(module.splits.first_window)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of bad samples
        scanned = batches()
        assert len(list(tmp_path.rglob("*.index.json"))) == len(list(tmp_path.rglob("*.tar")))
        forbid_scans(monkeypatch)
        assert batches() == scanned


def test_building_shards_writes_their_indexes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(root=str(tmp_path / "in"))
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    for key in "abcde":
        (tmp_path / f"in/{key}.jpg").write_bytes(image(key))
        (tmp_path / f"in/{key}.txt").write_text(key)

    def built(count: int) -> list[str]:
        source._rows = source._all_rows()[:count]
        options: dict[str, Any] = {"filters": Filters(), "settings": {}, "num_workers": 0}
        build(source, tmp_path / "out", shard_samples=2, **options)
        return sorted(path.name for path in tmp_path.glob("out/*.index.json"))

    assert built(5) == [f"0000{number}.tar.index.json" for number in range(3)]
    assert built(2) == ["00000.tar.index.json"]
    forbid_scans(monkeypatch)
    first, second = index_tar(str(tmp_path / "out/00000.tar"), "s").samples
    assert [first.captions, second.captions] == [("a",), ("b",)]


# Stale and invalid indexes


def test_a_changed_shard_is_scanned_again(tar: Path) -> None:
    def keys() -> list[str]:
        return [s.key for s in index_tar(str(tar), "s").samples]

    assert keys() == ["a", "b"]
    first = index_path(tar).read_bytes()
    mtime, size = tar.stat().st_mtime_ns, tar.stat().st_size
    write(
        tar,
        sample("x", punsafe=0.5)
        | sample("y")
        | {"z.txt": b"an image of z", "z.json": sample("z")["z.json"]},
    )
    assert tar.stat().st_size == size
    os.utime(tar, ns=(mtime, mtime + 1))
    assert keys() == ["x", "y"]
    write(tar, sample("l", 200, 200))
    os.utime(tar, ns=(mtime, mtime))
    assert tar.stat().st_size > size
    assert keys() == ["l"]
    index_path(tar).write_bytes(first)
    assert keys() == ["l"]


def test_an_index_of_an_older_format_is_replaced(
    tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_tar(str(tar), "s")
    before = json.loads(index_path(tar).read_text())
    monkeypatch.setattr(tar_index, "_FORMAT", before["format"] + 1)
    index_tar(str(tar), "s")
    assert json.loads(index_path(tar).read_text()) == {**before, "format": before["format"] + 1}


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def changed(**values: Any) -> Callable[[bytes], bytes]:
    """Changes the first value of a column."""

    def change(data: bytes) -> bytes:
        content = json.loads(data)
        for name, value in values.items():
            content[name][0] = value
        return json.dumps(content).encode()

    return change


def replaced(**columns: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), **columns}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda data: b"", lambda data: data[:-1], lambda data: data[: len(data) // 2]),
        *(lambda data: b"[" * 200_000, lambda data: b"\xff" + data, lambda data: b"[1]"),
        *(lambda data: b"null", lambda data: b"{}"),
        *(changed(width=0), changed(height=-5), changed(width=2_000_000), changed(width="x")),
        *(
            changed(width=None),
            changed(height=2**70),
            changed(height=[1]),
            changed(width=float("nan")),
        ),
        *(changed(offset=-1), changed(offset=2**62), changed(size=2**62), changed(size=-(2**62))),
        *(changed(key=1), changed(key=None), changed(captions=[1])),
        *(changed(captions="\ud800"), changed(captions=None), changed(metadata=None)),
        *(changed(metadata={"punsafe": "1"}), changed(metadata={"punsafe": float("inf")})),
        *(changed(metadata={"image_hash": 1}), changed(metadata=["punsafe"])),
        *(changed(bad="ab c"), changed(bad=None)),
        *(replaced(width=[3]), replaced(key=["a"]), replaced(metadata=[]), replaced(captions={})),
        *(replaced(bad=5), replaced(key=None)),
    ],
    ids=range(38),
)
def test_an_invalid_index_is_replaced(tar: Path, damage: Callable[[bytes], bytes]) -> None:
    scanned = repr(index_tar(str(tar), "s"))
    valid = index_path(tar).read_bytes()
    invalid = damage(valid)
    assert invalid != valid
    index_path(tar).write_bytes(invalid)
    assert repr(index_tar(str(tar), "s")) == scanned
    assert index_path(tar).read_bytes() == valid


def test_an_index_runs_no_code(tar: Path, tmp_path: Path) -> None:
    index_path(tar).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    assert len(index_tar(str(tar), "s").samples) == 2
    assert not (tmp_path / "ran").exists()


def test_a_damaged_shard_has_no_index(tar: Path) -> None:
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    assert index_tar(str(tar), "s").broken
    assert not index_path(tar).exists()


# Where indexes are written


def test_the_index_of_a_read_only_shard_is_in_the_download_folder(
    tar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_path(tar).mkdir()  # cannot be replaced by a file, even by root
    source = ShardSource(urls=str(tar), download_dir=str(tmp_path / "down"))
    scanned = repr(source.open(str(tar)))
    assert len(list((tmp_path / "down/indexes").iterdir())) == 1
    forbid_scans(monkeypatch)
    assert repr(source.open(str(tar))) == scanned


def test_without_a_writable_folder_shards_are_scanned_with_one_message(
    tar: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index_path(tar).mkdir()
    (tmp_path / "down").write_text("not a folder")
    source = ShardSource(urls=str(tar), download_dir=str(tmp_path / "down"))
    tar_index._log_unwritable.cache_clear()
    with caplog.at_level(logging.INFO):
        opened = [repr(source.open(str(tar))) for _ in range(3)]
    assert set(opened) == {repr(scan_tar(str(tar), str(tar)))}
    assert caplog.text.count("indexes of shards cannot be written") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["down", "s.tar", "s.tar.index.json"]


def index_repeatedly(path: str) -> set[str]:
    opened = set()
    for _ in range(50):
        opened.add(repr(index_tar(path, "s")))
        index_path(Path(path)).unlink(missing_ok=True)
    return opened


def test_two_processes_write_an_index_at_the_same_time(tar: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        opened = pool.map(index_repeatedly, [str(tar)] * 2, chunksize=1)
        pool.close()  # leaving the block would terminate workers, which may ignore SIGTERM
        pool.join()
    assert opened == [{repr(scan_tar(str(tar), "s"))}] * 2
    assert [path.name for path in tar.parent.iterdir()] == ["s.tar"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    for number in range(2):
        write(tmp_path / f"{number}.tar", sample(f"{number}"))
    yield from serve(tmp_path)


def test_the_index_of_a_download_is_evicted_with_it(server: Server, tmp_path: Path) -> None:
    down, size = tmp_path / "down", (tmp_path / "0.tar").stat().st_size
    source = ShardSource(
        urls=f"{server.url}/{{0..1}}.tar", download_dir=str(down), download_gb=size * 1.5 / 1e9
    )
    for shard in source.groups("train")[0].shards:
        assert len(source.open(shard).samples) == 1
        (cached,) = down.glob("*.tar")
        assert list(down.glob("*.json")) == [index_path(cached)]
