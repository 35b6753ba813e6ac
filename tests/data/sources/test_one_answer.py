"""Folders, tar files, tables, evaluation and editing give the same answer about the same files."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.data.hostile import (
    CAPTIONS,
    FILES,
    IMAGES,
    NO_CAPTION,
    NOT_USED,
    UNREADABLE,
    UNREADABLE_IMAGES,
    write_folder,
    write_tar,
)
from tests.data.sources.reading import samples_and_errors
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.hub import HubDataset
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Source
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.io.image_files import IMAGE_SUFFIXES, OTHER_SUFFIXES, split_suffix
from wuerstchen_pl.io.images import decode_image
from wuerstchen_pl.sampling.images import to_tensor

Answer = str | tuple[tuple[str, ...], tuple[int, int], str, dict[str, float]]


def answers(source: Source, root: Path, keys: list[str] | None = None) -> dict[str, Any]:
    """The captions, size, pixels and scores of each sample by name, or why it is not used."""
    samples, bad = samples_and_errors(source)
    by_name: dict[str, Any] = {}
    for sample in samples:
        if not sample.captions:
            by_name[f"!{sample.key if keys is None else keys[int(sample.key)]}"] = NO_CAPTION
            continue
        try:
            pixels = decode_image(source.read(sample))
            assert pixels.shape[:2] == (sample.height, sample.width)
            sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
            answer: Answer = (
                *(sample.captions, (sample.width, sample.height), sha256),
                sample.metadata,
            )
        except OSError:
            answer = UNREADABLE
        by_name[sample.key if keys is None else keys[int(sample.key)]] = answer
    for error in bad:
        name = error.where
        if keys is not None:
            name = keys[int(name.split("row ")[1].split(" ")[0])]
        elif f"{root}/" in name:
            name = name.split(f"{root}/", 1)[1]
        by_name.setdefault(f"!{name}", error.reason)
    suffixes = (*IMAGE_SUFFIXES, *OTHER_SUFFIXES, "txt")
    return {
        (split_suffix(name)[0] if split_suffix(name)[1] in suffixes else name): answer
        for name, answer in by_name.items()
    }


def from_folder(root: Path, files: dict[str, Any]) -> dict[str, Any]:
    return answers(FolderSource(root=str(write_folder(root / "folder", files))), root / "folder")


def from_tar(root: Path, files: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    path = write_tar(root / "00000.tar", files, prefix=prefix)
    return answers(ShardSource(urls=str(path), download_dir=str(root / "downloads")), path)


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_folder_and_a_tar_file_of_it_have_the_same_samples(tmp_path: Path, prefix: str) -> None:
    folder, tar = from_folder(tmp_path, FILES), from_tar(tmp_path, FILES, prefix)
    assert folder == tar
    assert {name[1:]: reason for name, reason in tar.items() if isinstance(reason, str)} == NOT_USED
    images = {key for key, suffix in map(split_suffix, FILES) if suffix in IMAGE_SUFFIXES}
    assert {name for name in tar if not name.startswith("!")} == images - {
        *NOT_USED,
        "masked.mask",
    } | {"pair"}
    assert tar["listed"][0] == ("one", "two")
    assert tar["only-listed"][0] == ("from the list",)
    assert tar["marked-json"][3] == {"pwatermark": 0.5}
    assert tar["scores"][3] == {"pwatermark": 0.5, "aesthetic": 7.0}
    assert tar["linked"] == tar["hard"] == tar["plain"]


def one_caption(files: dict[str, bytes]) -> dict[str, Any]:
    return files | {f"{split_suffix(name)[0]}.txt": b"a caption" for name in files}


def from_table(root: Path, images: dict[str, bytes], captions: dict[str, str]) -> dict[str, Any]:
    folder = write_folder(root / "table", dict(images))
    rows = [{"file_name": name, "text": captions[name]} for name in images]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return answers(FolderSource(root=str(folder)), folder)


def from_hub(
    root: Path, images: dict[str, bytes], captions: dict[str, str], column: str
) -> dict[str, Any]:
    feature: Any = {
        "images": datasets.Image(),
        "bytes": datasets.Value("binary"),
        "structs": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    }[column]
    values: list[Any] = list(images.values())
    if column == "structs":
        values = [{"bytes": data, "path": None} for data in values]
    features = datasets.Features({"image": feature, "text": datasets.Value("string")})
    table = {"image": values, "text": [captions[name] for name in images]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(root / column))
    return answers(HubDataset(name=str(root / column)), root, list(images))


def by_stem(files: dict[str, Any]) -> dict[str, Any]:
    """Files with unique names without their suffix."""
    return {f"{split_suffix(name)[0]}-{i}.{name.rpartition('.')[2]}": data
            for i, (name, data) in enumerate(files.items())}  # fmt: skip


def test_every_source_decodes_an_image_alike(tmp_path: Path) -> None:
    images = by_stem(IMAGES)
    captions = dict.fromkeys(images, "a caption")
    expected = from_folder(tmp_path, one_caption(images))
    unreadable = {name.lstrip("!") for name, answer in expected.items() if answer == UNREADABLE}
    original = dict(zip(images, IMAGES, strict=True))
    assert {original[n] for n in images if split_suffix(n)[0] in unreadable} == UNREADABLE_IMAGES

    def plain(by_name: dict[str, Any]) -> dict[str, Any]:
        return {name.lstrip("!"): answer for name, answer in by_name.items()}

    assert plain(from_tar(tmp_path, one_caption(images))) == plain(expected)
    assert plain(from_table(tmp_path, images, captions)) == plain(expected)
    for column in ("images", "bytes", "structs"):
        assert plain(from_hub(tmp_path, images, captions, column)) == plain(expected)


def test_every_source_reads_a_caption_alike(tmp_path: Path) -> None:
    jpeg = IMAGES["RGB-of.jpg"]
    files: dict[str, Any] = {f"{name}.jpg": jpeg for name in CAPTIONS}
    files |= {f"{name}.txt": data for name, (data, _) in CAPTIONS.items() if data is not None}
    expected = {
        (f"!{name}" if text.startswith("!") else name): text.removeprefix("!")
        for name, (_, text) in CAPTIONS.items()
    }

    def captions(by_name: dict[str, Any]) -> dict[str, str]:
        return {
            name: answer if isinstance(answer, str) else answer[0][0]
            for name, answer in by_name.items()
        }

    assert captions(from_folder(tmp_path, files)) == expected
    assert captions(from_tar(tmp_path, files)) == expected
    # as a field of a table, a caption is decoded already
    texts = {name: (data or b"").decode("utf-8", "replace") for name, (data, _) in CAPTIONS.items()}
    decoded = {name: text for name, text in texts.items() if "\ufffd" not in text}
    images = {f"{name}.jpg": jpeg for name in decoded}
    strings = {f"{name}.jpg": text for name, text in decoded.items()}
    kept = {name: text for name, text in expected.items() if name.lstrip("!") in decoded}
    assert captions(from_table(tmp_path, images, strings)) == kept
    assert captions(from_hub(tmp_path, images, strings, "images")) == kept


def test_evaluation_and_editing_decode_images_as_training_does(tmp_path: Path) -> None:
    readable = {n: d for n, d in by_stem(IMAGES).items() if not _is_unreadable(d)}
    folder = ImageFolder(write_folder(tmp_path / "good", dict(readable)))
    assert len(folder) == len(readable) == len(IMAGES) - len(UNREADABLE_IMAGES)
    for index, path in enumerate(folder.paths):
        expected = decode_image(readable[path.name])
        assert np.array_equal(np.asarray(folder.image(index)), expected), path.name
        edited = to_tensor(Image.open(io.BytesIO(readable[path.name])))[0].permute(1, 2, 0) * 255
        # simplejpeg and PIL may round differently
        assert np.abs(edited.numpy() - expected).max() <= 2.5, path.name


@pytest.mark.parametrize("name", sorted(UNREADABLE_IMAGES))
def test_evaluation_names_an_image_that_training_cannot_read(tmp_path: Path, name: str) -> None:
    folder = ImageFolder(write_folder(tmp_path, {name: IMAGES[name]}))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        folder.image(0)


def _is_unreadable(data: bytes) -> bool:
    return data in {IMAGES[name] for name in UNREADABLE_IMAGES}
