"""Folders of images with caption files or a table."""

import dataclasses
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.data.factories import image
from tests.data.sources.reading import samples_and_errors
from wuerstchen_pl.data.sources.folder import FolderSource


def test_images_with_caption_files(image_folder: Path) -> None:
    source = FolderSource(root=str(image_folder))
    samples, bad = samples_and_errors(source)
    assert [s.key for s in samples] == ["a.png", "b.jpg", "more/c.JPG"]
    assert [s.captions for s in samples] == [(f"caption of {s.key}",) for s in samples]
    assert {(s.width, s.height) for s in samples} == {(30, 20)}
    assert not bad
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(s) for s in samples] == [image(s.key, 30, 20) for s in samples]


def test_missing_and_invalid_files_are_reported(image_folder: Path) -> None:
    (image_folder / "b.txt").unlink()
    (image_folder / "a.txt").write_bytes(b"caf\xe9")
    (image_folder / "more/c.JPG").write_bytes(b"")
    samples, bad = samples_and_errors(FolderSource(root=str(image_folder)))
    assert [(s.key, s.captions) for s in samples] == [("b.jpg", ())]
    assert [(b.reason, Path(b.where).name) for b in bad] == [
        ("caption is not UTF-8", "a.png"),
        ("unreadable image", "c.JPG"),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_in_a_table(image_folder: Path, kind: str) -> None:
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
    (image_folder / f"metadata.{kind}").write_text(text)
    samples, bad = samples_and_errors(FolderSource(root=str(image_folder)))
    assert [(s.key, s.captions, s.metadata) for s in samples] == [
        ("more/c.JPG", ("see",), {"pwatermark": 0.5}),
        ("b.jpg", ("be",), {}),
        ("a.png", (), {}),
    ]
    assert [b.reason for b in bad] == ["no image"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"file_name": "a.png"}', "row 1 of .* has no text or caption"),
        ('{"text": "x"}', "row 1 of .* has no file_name or file"),
        ('no JSON\n{"file": "a.png", "txt": "x"}', "row 2 of .* has no text or caption"),
    ],
)
def test_a_table_without_required_columns_is_rejected(
    image_folder: Path, line: str, message: str
) -> None:
    (image_folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        FolderSource(root=str(image_folder)).prepare()


def test_unusable_rows_are_reported_with_their_reason(image_folder: Path) -> None:
    (image_folder.parent / "secret.png").write_bytes(image("secret"))
    lines: list[Any] = [
        {"file_name": "a.png", "text": "one", "punsafe": math.nan, "pwatermark": "0.25"},
        "no JSON",
        [1],
        {"file_name": "../secret.png", "text": "x"},
        {"file_name": str(image_folder / "b.jpg"), "text": "x"},
        {"file_name": 7, "text": "x"},
        {"file_name": "x" * 300 + ".png", "text": "x"},
        {"file_name": "b.jpg", "text": "half \ud800"},
        {"file_name": "b.jpg", "text": "caf\udce9"},  # becomes an invalid UTF-8 byte below
        {"file_name": "b.jpg"},
        {"file_name": "more/c.JPG", "text": "last"},
    ]
    text = "\n".join(json.dumps(x) if not isinstance(x, str) else x for x in lines)
    raw = text.replace("\\udce9", "\udce9").encode("utf-8", "surrogateescape")
    (image_folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + raw)  # with a byte order mark
    samples, bad = samples_and_errors(FolderSource(root=str(image_folder)))
    assert [(s.key, s.metadata) for s in samples] == [
        ("a.png", {"pwatermark": 0.25}),
        ("b.jpg", {}),
        ("more/c.JPG", {}),
    ]
    assert [b.reason for b in bad] == [
        *("unreadable row", "unreadable row"),
        *("image outside of the folder", "image outside of the folder"),
        *("no image", "no image", "caption is not UTF-8", "caption is not UTF-8"),
    ]
    with pytest.raises(PermissionError, match="is outside "):
        FolderSource(root=str(image_folder)).read(
            dataclasses.replace(samples[0], key="../secret.png")
        )


def test_a_field_that_csv_rejects_costs_only_its_row(image_folder: Path) -> None:
    rows = ["file_name,text", "a.png,one", f"b.jpg,{'long ' * 40_000}", "more/c.JPG,three"]
    (image_folder / "metadata.csv").write_text("\n".join(rows))
    samples, bad = samples_and_errors(FolderSource(root=str(image_folder)))
    assert [s.key for s in samples] == ["a.png", "more/c.JPG"]
    assert [b.reason for b in bad] == ["unreadable row", "not in the table"]


def test_a_larger_folder_has_another_last_shard(image_folder: Path) -> None:
    names = FolderSource(root=str(image_folder)).groups("train")[0].shards
    (image_folder / "d.png").write_bytes(image("d"))
    assert FolderSource(root=str(image_folder)).groups("train")[0].shards != names


def test_a_folder_without_images_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root='.*nowhere' is not a folder"):
        FolderSource(root=str(tmp_path / "nowhere")).prepare()
    with pytest.raises(FileNotFoundError, match="contains no images"):
        FolderSource(root=str(tmp_path)).prepare()
    (tmp_path / "photo.heic").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("a note")
    summary = "1 x no image; 1 x unsupported image format"
    with pytest.raises(FileNotFoundError, match=rf"contains no images \(jpg, .*; {summary}\); use"):
        FolderSource(root=str(tmp_path)).prepare()


def test_a_table_covers_its_folder_and_the_folders_below(image_folder: Path) -> None:
    for name in ("more/d.png", "more/deep/e.png", "more/deep/f.png", "more/._d.png"):
        (image_folder / name).parent.mkdir(exist_ok=True)
        (image_folder / name).write_bytes(image(name))
    rows = [{"file_name": "./d.png", "text": "dee"}, {"file_name": "deep/e.png", "text": "ee"}]
    (image_folder / "more/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = FolderSource(root=str(image_folder))
    samples, bad = samples_and_errors(source)
    assert [(s.key, s.captions) for s in samples] == [
        ("more/d.png", ("dee",)),
        ("more/deep/e.png", ("ee",)),
        ("a.png", ("caption of a.png",)),
        ("b.jpg", ("caption of b.jpg",)),
    ]
    assert source.read(samples[1]) == image("more/deep/e.png")
    root = str(image_folder)
    assert [(b.reason, b.where.removeprefix(root), b.is_bad) for b in bad] == [
        ("hidden file", "/more/._d.png", False),
        ("not in the table", "/more/c.JPG", False),
        ("not in the table", "/more/deep/f.png", False),
    ]


def test_a_table_may_be_in_utf_16_as_spreadsheets_write_it(image_folder: Path) -> None:
    text = "file_name,text\r\na.png,ein H\u00e4schen\r\n"
    (image_folder / "metadata.csv").write_bytes(text.encode("utf-16"))
    samples, _ = samples_and_errors(FolderSource(root=str(image_folder)))
    assert [(s.key, s.captions) for s in samples] == [("a.png", ("ein H\u00e4schen",))]


def test_two_tables_in_one_folder_are_rejected(image_folder: Path) -> None:
    for kind, text in (("jsonl", '{"file_name": "a.png", "text": "x"}'), ("csv", "file_name,text")):
        (image_folder / f"metadata.{kind}").write_text(text)
    with pytest.raises(ValueError, match=r"metadata\.jsonl and metadata\.csv; remove one of them"):
        FolderSource(root=str(image_folder)).prepare()


def test_linked_folders_are_read_once(image_folder: Path) -> None:
    elsewhere = image_folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "e.png").write_bytes(image("e"))
    (elsewhere / "e.txt").write_text("e")
    (image_folder / "link").symlink_to(elsewhere)
    (image_folder / "more/loop").symlink_to(image_folder)
    (image_folder / "same").symlink_to(image_folder / "more")
    samples, bad = samples_and_errors(FolderSource(root=str(image_folder)))
    assert [s.key for s in samples] == ["a.png", "b.jpg", "link/e.png", "more/c.JPG"]
    assert not bad


def test_a_folder_without_permission_is_reported(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refuse(path: str) -> Any:  # the superuser may read every folder
        if path.endswith("more"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    samples, bad = samples_and_errors(FolderSource(root=str(image_folder)))
    assert [s.key for s in samples] == ["a.png", "b.jpg"]
    assert [(b.reason, b.where) for b in bad] == [("unreadable folder", str(image_folder / "more"))]
