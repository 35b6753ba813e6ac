"""Local shards, intact and damaged, and shards that a command writes."""

import io
import math
import pickle
import tarfile
from pathlib import Path

import pytest
import webdataset

from tests.data.factories import encode, image, sample, shards, write
from tests.data.sources.reading import open_all, reasons
from wuerstchen_pl.data.sources import manifest
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import unit_hash
from wuerstchen_pl.data.sources.tar_index import index_tar
from wuerstchen_pl.data.sources.urls import expand_urls


def test_bytes_and_captions_match_webdataset(shard_folder: Path) -> None:
    source = ShardSource(urls=str(shard_folder / "{00000..00001}.tar"))
    samples = [s for index in open_all(source) for s in index.samples]
    names = [str(shard_folder / f"0000{i}.tar") for i in range(2)]
    expected = list(webdataset.WebDataset(names, shardshuffle=False))
    assert [s.key for s in samples] == [t["__key__"] for t in expected]
    assert [s.captions[0].encode() for s in samples] == [t["txt"] for t in expected]
    assert [source.read(s) for s in samples] == [t["jpg"] for t in expected]
    assert [(s.width, s.height) for s in samples] == [(30, 20), (10, 40), (16, 16)]


def test_folder_pattern_list_and_list_file_are_equivalent(shard_folder: Path) -> None:
    listed = [str(shard_folder / "00000.tar"), str(shard_folder / "00001.tar")]
    (shard_folder / "all.txt").write_text("\n".join(listed) + "\n\n")
    variants = [
        str(shard_folder),
        str(shard_folder / "{00000..00001}.tar"),
        listed,
        str(shard_folder / "all.txt"),
    ]
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


def test_source_reads_the_same_after_pickling(shard_folder: Path) -> None:
    source = ShardSource(urls=str(shard_folder))
    samples = [s for index in open_all(source) for s in index.samples]
    before = [source.read(s) for s in samples]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(s) for s in samples] == before


def test_incomplete_samples_are_skipped_and_counted(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for key in "abcdef":
        members |= sample(key)
    del members["b.txt"], members["c.jpg"], members["d.json"]
    members["d.jpg"] = b"no image"
    members["e.txt"] = b"caf\xe9"
    members["f.json"] = b"{broken"  # its size is read from the image instead
    index = index_tar(str(write(tmp_path / "s.tar", members)), "s")
    assert [(s.key, len(s.captions)) for s in index.samples] == [("a", 1), ("b", 0), ("f", 1)]
    assert reasons(index) == {
        "no image": 1,
        "unreadable image": 1,
        "caption is not UTF-8": 1,
    }
    assert not index.broken


@pytest.mark.parametrize(
    ("damage", "left", "expected"),
    [
        ("header", 1, {"damaged shard": 1, "lost samples": 3}),
        ("cut", 2, {"damaged shard": 1, "lost samples": 2}),
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
    (index,) = open_all(ShardSource(urls=str(path)))
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
    assert reasons(index_tar(str(path), "s", expected=2)) == {"repeated name": 1, "lost samples": 1}


def test_samples_missing_from_an_intact_shard_are_counted(
    shard_folder: Path,
) -> None:
    path = shard_folder / "00000.tar"
    manifest.write(shard_folder, [{**manifest.entry_of(path, 2), "samples": 5}])
    assert reasons(ShardSource(urls=str(shard_folder)).open(str(path))) == {"lost samples": 3}


def test_reading_a_truncated_image_raises_an_os_error(shard_folder: Path) -> None:
    source = ShardSource(urls=str(shard_folder / "00000.tar"))
    first, second = source.open(str(shard_folder / "00000.tar")).samples
    data = (shard_folder / "00000.tar").read_bytes()
    (shard_folder / "00000.tar").write_bytes(data[: second.offset + 4])
    assert source.read(first)
    with pytest.raises(OSError, match="was truncated after"):
        source.read(second)


def test_an_allowed_command_writes_a_shard(shard_folder: Path, tmp_path: Path) -> None:
    source = ShardSource(
        urls=[f"pipe:cat {shard_folder / '00000.tar'}", "pipe:echo broken >&2; exit 3"],
        allow_pipe=True,
        download_dir=str(tmp_path / "down"),
    )
    good, bad = open_all(source)
    assert source.read(good.samples[0]) == image("000000000", 30, 20)
    assert "failed with status 3: broken" in bad.bad[0].where


def test_shards_helper_returns_the_written_keys(tmp_path: Path) -> None:
    keys = shards(tmp_path / "many", 3, 4)
    indexes = open_all(ShardSource(urls=str(tmp_path / "many")))
    assert [s.key for index in indexes for s in index.samples] == keys
