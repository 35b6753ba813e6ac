"""Datasets of the Hugging Face Hub, saved on disk."""

import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from tests.data.factories import encode, image
from tests.data.sources.reading import samples_and_errors
from wuerstchen_pl.data.sources.hub import HubDataset


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
        ((), 32),
        (("three",), 33),
        (("four",), 34),
    ]
    assert not bad
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
    assert [s.captions for s in samples] == [("a", "b"), (), ("c",), ("d", "e", "f"), ("g",)]


def test_a_folder_is_loaded_by_the_hub_library(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for path in [*image_folder.rglob("*.txt"), image_folder / "more/c.JPG"]:
        path.unlink()
    rows = [{"file_name": name, "text": name} for name in ("b.jpg", "a.png")]
    (image_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples, _ = samples_and_errors(HubDataset(name=str(image_folder)))
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
        ({"split": "validation"}, ValueError, r"data\.split='validation' .* has only train;"),
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
