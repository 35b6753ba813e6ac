"""Image folders, Hub datasets, and mixtures of sources."""

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.data.factories import FakeSource, encode, image, shards
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.hub import HubDataset
from wuerstchen_pl.data.sources.mix import Mix
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Sample, SampleError, Source


def samples_and_errors(source: Source) -> tuple[list[Sample], list[SampleError]]:
    source.prepare()
    opened = [source.open(name) for group in source.groups("train") for name in group.shards]
    return [s for o in opened for s in o.samples], [b for o in opened for b in o.bad]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for name in ("b.jpg", "a.png", "more/c.JPG"):
        (root / name).write_bytes(image(name, 30, 20))
        (root / name).with_suffix(".txt").write_text(f" caption of {name}\n")
    return root


def test_images_with_caption_files(folder: Path) -> None:
    source = FolderSource(root=str(folder))
    samples, bad = samples_and_errors(source)
    assert [s.key for s in samples] == ["a.png", "b.jpg", "more/c.JPG"]
    assert [s.captions for s in samples] == [(f"caption of {s.key}",) for s in samples]
    assert {(s.width, s.height) for s in samples} == {(30, 20)}
    assert not bad
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(s) for s in samples] == [image(s.key, 30, 20) for s in samples]


def test_missing_and_invalid_files_are_reported(folder: Path) -> None:
    (folder / "b.txt").unlink()
    (folder / "a.txt").write_bytes(b"caf\xe9")
    (folder / "more/c.JPG").write_bytes(b"")
    samples, bad = samples_and_errors(FolderSource(root=str(folder)))
    assert not samples
    assert [(b.reason, Path(b.where).name) for b in bad] == [
        ("caption is not UTF-8", "a.png"),
        ("no caption", "b.jpg"),
        ("unreadable image", "c.JPG"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_in_a_table(folder: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [
        {"file_name": "more/c.JPG", "text": "see", "pwatermark": 0.5},
        {"file_name": "b.jpg", "text": "be", "pwatermark": None},
        {"file_name": "gone.jpg", "text": "gone", "pwatermark": None},
        {"file_name": "a.png", "text": "", "pwatermark": None},
    ]
    if kind == "jsonl":
        text = "\n".join(map(json.dumps, rows)) + "\n\n"
    else:
        text = "file_name,text,pwatermark\n" + "\n".join(
            f"{r['file_name']},{r['text']},{'' if r['pwatermark'] is None else r['pwatermark']}"
            for r in rows
        )
    (folder / f"metadata.{kind}").write_text(text)
    samples, bad = samples_and_errors(FolderSource(root=str(folder)))
    assert [(s.key, s.captions, s.metadata) for s in samples] == [
        ("more/c.JPG", ("see",), {"pwatermark": 0.5}),
        ("b.jpg", ("be",), {}),
    ]
    assert [b.reason for b in bad] == ["no image", "no caption"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"}', "row 1 of .* has no text or caption"),
        ('{"text": "x"}', "row 1 of .* has no file_name or file"),
        ('no JSON\n{"file": "a.png", "txt": "x"}', "row 2 of .* has no text or caption"),
    ],
)
def test_a_table_without_required_columns_is_rejected(
    folder: Path, line: str, message: str
) -> None:
    (folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        FolderSource(root=str(folder)).prepare()


def test_unusable_rows_are_reported_with_their_reason(folder: Path) -> None:
    (folder.parent / "secret.png").write_bytes(image("secret"))
    lines: list[Any] = [
        {"file_name": "a.png", "text": "one", "punsafe": math.nan, "pwatermark": "0.25"},
        "no JSON",
        [1],
        {"file_name": "../secret.png", "text": "x"},
        {"file_name": str(folder / "b.jpg"), "text": "x"},
        {"file_name": 7, "text": "x"},
        {"file_name": "x" * 300 + ".png", "text": "x"},
        {"file_name": "b.jpg", "text": "half \ud800"},
        {"file_name": "b.jpg", "text": "caf\udce9"},  # becomes an invalid UTF-8 byte below
        {"file_name": "b.jpg"},
        {"file_name": "more/c.JPG", "text": "last"},
    ]
    text = "\n".join(json.dumps(x) if not isinstance(x, str) else x for x in lines)
    raw = text.replace("\\udce9", "\udce9").encode("utf-8", "surrogateescape")
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + raw)  # with a byte order mark
    samples, bad = samples_and_errors(FolderSource(root=str(folder)))
    assert [(s.key, s.metadata) for s in samples] == [
        ("a.png", {"pwatermark": 0.25}),
        ("more/c.JPG", {}),
    ]
    assert [b.reason for b in bad] == [
        *("unreadable row", "unreadable row"),
        *("image outside of the folder", "image outside of the folder"),
        *("no image", "no image", "caption is not UTF-8", "caption is not UTF-8", "no caption"),
    ]
    with pytest.raises(PermissionError, match="is outside "):
        FolderSource(root=str(folder)).read(dataclasses.replace(samples[0], key="../secret.png"))


def test_a_field_that_csv_rejects_costs_only_its_row(folder: Path) -> None:
    rows = ["file_name,text", "a.png,one", f"b.jpg,{'long ' * 40_000}", "more/c.JPG,three"]
    (folder / "metadata.csv").write_text("\n".join(rows))
    samples, bad = samples_and_errors(FolderSource(root=str(folder)))
    assert [s.key for s in samples] == ["a.png", "more/c.JPG"]
    assert [b.reason for b in bad] == ["unreadable row"]


def test_a_larger_folder_has_another_last_shard(folder: Path) -> None:
    names = FolderSource(root=str(folder)).groups("train")[0].shards
    (folder / "d.png").write_bytes(image("d"))
    assert FolderSource(root=str(folder)).groups("train")[0].shards != names


def test_a_folder_without_images_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root='.*nowhere' is not a folder"):
        FolderSource(root=str(tmp_path / "nowhere")).prepare()
    with pytest.raises(FileNotFoundError, match="contains no images"):
        FolderSource(root=str(tmp_path)).prepare()


# Datasets of the Hub library


@pytest.fixture
def table(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    rows = {
        "image": [Image.new("RGB", (30 + i, 20), (i, 0, 0)) for i in range(5)],
        "text": ["zero", "one", None, "three", "four"],
        "several": [["a", "b"], [], ["c"], ["d", "e", "f"], ["g"]],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "several": datasets.List(datasets.Value("string")),
        }
    )
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(
        str(tmp_path / "saved")
    )
    return tmp_path / "saved"


def test_rows_of_a_saved_dataset(table: Path) -> None:
    source = HubDataset(name=str(table))
    samples, bad = samples_and_errors(source)
    assert [(s.captions, s.width) for s in samples] == [
        (("zero",), 30),
        (("one",), 31),
        (("three",), 33),
        (("four",), 34),
    ]
    assert [b.reason for b in bad] == ["no caption"]
    copy = pickle.loads(pickle.dumps(source))
    for s in samples:
        assert copy.read(s) == encode(Image.new("RGB", (s.width, 20), (s.offset, 0, 0)), "PNG")


def test_a_table_cannot_read_files_outside_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra hf")
    outside, inside = tmp_path / "private.png", tmp_path / "table/inside.png"
    inside.parent.mkdir()
    for path in (outside, inside):
        Image.new("RGB", (8, 8)).save(path)
    paths = [
        str(inside),
        str(outside),
        str(inside.parent / "../private.png"),
        str(inside.parent),
        None,
    ]
    paths += [f"{inside}\0", "~nosuchuser/x.png"]
    rows = [{"image": {"bytes": None, "path": p}, "text": str(i)} for i, p in enumerate(paths)]
    source = HubDataset(name=str(inside.parent))
    source._tables["train"] = rows  # as in an untrusted parquet file
    samples, bad = samples_and_errors(source)
    assert [s.captions for s in samples] == [("0",)]
    assert [b.reason for b in bad] == ["no image"] * 6


def test_other_columns_of_a_table_are_not_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "mask": datasets.Image(),
            "punsafe": datasets.Value("float32"),
        }
    )
    row = {"image": {"bytes": image("a"), "path": None}, "text": "a", "punsafe": 0.5}
    row["mask"] = {"bytes": b"no image", "path": None}
    table = datasets.Dataset.from_list([row], features=features)
    table.save_to_disk(str(tmp_path / "saved"))
    samples, bad = samples_and_errors(HubDataset(name=str(tmp_path / "saved")))
    assert [(s.captions, s.metadata) for s in samples] == [(("a",), {"punsafe": 0.5})]
    assert not bad


def test_a_column_of_lists_gives_several_captions(table: Path) -> None:
    samples, _ = samples_and_errors(HubDataset(name=str(table), caption_column="several"))
    assert [s.captions for s in samples] == [("a", "b"), ("c",), ("d", "e", "f"), ("g",)]


def test_a_folder_is_loaded_by_the_hub_library(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for path in [*folder.rglob("*.txt"), folder / "more/c.JPG"]:
        path.unlink()
    rows = [{"file_name": name, "text": name} for name in ("b.jpg", "a.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, _ = samples_and_errors(HubDataset(name=str(folder)))
    assert sorted(s.captions[0] for s in samples) == ["a.png", "b.jpg"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"caption_column": "txt"},
            ValueError,
            "'txt' is not a column of .* from image, text, sev",
        ),
        ({"image_column": "text"}, ValueError, r"data\.image_column='text' .* contains no images"),
        ({"split": "validation"}, FileNotFoundError, r"data\.split='validation' cannot be loaded"),
        (
            {"name": "no/such"},
            FileNotFoundError,
            r"data\.name='no/such'.*use the path of a folder",
        ),
    ],
)
def test_wrong_names_are_rejected(
    table: Path, settings: dict, error: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error, match=message):
        HubDataset(**{"name": str(table)} | settings).prepare()


# Mixtures


def test_a_mixture_reads_from_each_of_its_sources(folder: Path, tmp_path: Path) -> None:
    shards(tmp_path / "tars", 2, 3)
    mix = Mix(
        sources={
            "local": FolderSource(root=str(folder)),
            "web": ShardSource(urls=str(tmp_path / "tars")),
        },
        weights={"local": 3},
    )
    samples, _ = samples_and_errors(mix)
    assert len({s.name for s in samples}) == len({s.group_key for s in samples}) == 3 + 6
    assert [group.weight for group in mix.groups("train")] == [3, 1]
    expected = [image(s.key, s.width, s.height) for s in samples]
    assert [mix.read(s) for s in samples] == expected


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        ({}, None, r"sources=\{\} is empty"),
        ({"a": FakeSource({})}, {"b": 1}, r"weights=\{.*\} names 'b', which is not one of"),
        ({"a": FakeSource({})}, {"a": 0}, r"weights\.a=0 is out of range; use more than 0"),
    ],
)
def test_an_invalid_mixture_is_rejected(sources: dict, weights: dict | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mix(sources=sources, weights=weights)
