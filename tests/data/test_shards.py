import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from wuerstchen_pl.data.shards import Shards, ShardSource


def picture(width: int, height: int, orientation: int = 1) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), (width % 256, height % 256, 0)).save(
        buffer, "JPEG", exif=exif
    )
    return buffer.getvalue()


def write(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def sample(key: str, width: int = 30, height: int = 20) -> dict[str, bytes]:
    facts = json.dumps({"width": width, "height": height, "status": "success"})
    return {
        f"{key}.jpg": picture(width, height),
        f"{key}.txt": f"a picture of {key}".encode(),
        f"{key}.json": facts.encode(),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "00000.tar", sample("000000000", 30, 20) | sample("000000001", 10, 40))
    write(tmp_path / "00001.tar", sample("000010000", 16, 16))
    return tmp_path


def test_bytes_and_captions_equal_what_webdataset_reads(folder: Path) -> None:
    ours = Shards(urls=str(folder / "{00000..00001}.tar"))
    theirs = list(webdataset.WebDataset(ours.paths, shardshuffle=False))
    assert [s.key for s in ours.samples] == [t["__key__"] for t in theirs]
    assert [s.caption.encode() for s in ours.samples] == [t["txt"] for t in theirs]
    assert [ours.read(s) for s in ours.samples] == [t["jpg"] for t in theirs]
    assert [(s.width, s.height) for s in ours.samples] == [(30, 20), (10, 40), (16, 16)]


def test_folder_pattern_and_list_mean_the_same(folder: Path) -> None:
    pattern = str(folder / "{00000..00001}.tar")
    listed = [str(folder / "00000.tar"), str(folder / "00001.tar")]
    samples = [Shards(urls=urls).samples for urls in (str(folder), pattern, listed)]
    assert samples[0] == samples[1] == samples[2]


def test_incomplete_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    members = sample("a") | sample("b") | sample("c") | sample("d")
    del members["b.txt"], members["c.jpg"], members["d.json"]
    members["d.jpg"] = b"no picture"
    write(tmp_path / "s.tar", members)
    shards = Shards(urls=str(tmp_path))
    assert [s.key for s in shards.samples] == ["a"]
    assert shards.skipped == {"no txt": 1, "no picture": 1, "unreadable picture": 1}


def test_size_without_json_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    write(tmp_path / "s.tar", {"a.jpg": picture(30, 20, orientation=6), "a.txt": b"turned"})
    found = Shards(urls=str(tmp_path)).samples[0]
    assert (found.width, found.height) == (20, 30)


@pytest.mark.parametrize("damage", ["header", "cut"])
def test_damaged_shard_is_refused_instead_of_losing_samples(folder: Path, damage: str) -> None:
    path = folder / "00000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[3].offset
    if damage == "header":
        data[fourth : fourth + 64] = b"x" * 64
    else:
        del data[fourth + 700 :]
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"data\.source\.urls names .*00000\.tar.*write it again"):
        Shards(urls=str(folder))


@pytest.mark.parametrize("url", ["pipe:cat x.tar", "https://host/x.tar", "s3://bucket/x.tar"])
def test_addresses_are_refused_before_anything_is_read(url: str) -> None:
    with pytest.raises(ValueError, match=r"data\.source\.urls=.* is not a local path"):
        ShardSource(urls=["/nowhere/a.tar", url])


def test_missing_and_empty_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.source\.urls=.*no tar file"):
        ShardSource(urls=str(tmp_path / "no.tar")).prepare()
    with pytest.raises(FileNotFoundError, match=r"no tar file"):
        Shards(urls=str(tmp_path))
    write(tmp_path / "s.tar", {"a.txt": b"alone"})
    with pytest.raises(ValueError, match=r"holds no sample .*'no picture': 1"):
        Shards(urls=str(tmp_path))


def test_split_is_disjoint_complete_and_independent_of_other_shards(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", {k: v for i in range(50) for k, v in sample(f"k{i:03d}").items()})
    first = ShardSource(urls=str(tmp_path), val_fraction=0.2)
    train, val = ({s.key for s in first.samples(split)} for split in ("train", "val"))
    assert train | val == {f"k{i:03d}" for i in range(50)}
    assert not train & val
    assert 3 <= len(val) <= 20
    write(tmp_path / "1.tar", {k: v for i in range(50, 99) for k, v in sample(f"k{i}").items()})
    both = ShardSource(urls=str(tmp_path), val_fraction=0.2)
    assert val <= {s.key for s in both.samples("val")}
    assert train <= {s.key for s in both.samples("train")}


def test_val_urls_and_val_fraction_exclude_each_other(folder: Path) -> None:
    urls = [str(folder / f"0000{i}.tar") for i in range(2)]
    with pytest.raises(ValueError, match=r"set one of them"):
        ShardSource(urls=urls[0], val_urls=urls[1], val_fraction=0.1)
    source = ShardSource(urls=urls[0], val_urls=urls[1])
    assert [s.key for s in source.samples("val")] == ["000010000"]
    assert len(source.samples("train")) == 2


def test_source_reads_the_same_after_pickling(folder: Path) -> None:
    source = ShardSource(urls=str(folder))
    samples = source.samples("train")
    before = [source.read(s) for s in samples]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(s) for s in samples] == before
