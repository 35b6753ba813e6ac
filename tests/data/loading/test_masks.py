"""Masks and weights of images: from files, tar files and alpha channels to batches."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import run_program
from tests.data.factories import encode, image, write
from tests.data.sources.reading import samples_and_errors
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.masks import crop_mask
from wuerstchen_pl.data.sources.folder import FolderSource
from wuerstchen_pl.data.sources.mix import Mix
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Source
from wuerstchen_pl.io.images import decode_alpha, decode_gray


def ramp(width: int, height: int) -> np.ndarray:
    """Gray levels that tell every position of a crop: they rise to the right and downwards."""
    y, x = np.mgrid[:height, :width]
    return (60 + 130 * x / width + 60 * y / height).astype(np.uint8)


def members(kind: str, count: int = 8) -> dict[str, bytes]:
    """Files of images that equal their masks (``file``), or 255 minus their alpha (``alpha``)."""
    files = {}
    for i in range(count):
        gray = Image.fromarray(ramp(96 + 8 * i, 64))
        files[f"{i}.txt"] = f"number {i}".encode()
        if kind == "alpha":
            black = Image.new("L", gray.size)
            files[f"{i}.png"] = encode(Image.merge("LA", (black, gray)), "PNG")
        else:
            files[f"{i}.png"] = encode(gray, "PNG")
            # of another size, as a mask may be
            files[f"{i}.mask.png"] = encode(gray.resize((gray.width * 2, 128)), "PNG")
    return files


def folder(path: Path, files: dict[str, bytes]) -> FolderSource:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return FolderSource(root=str(path))


def source_of(layout: str, path: Path, files: dict[str, bytes]) -> Source:
    if layout == "tar":
        return ShardSource(urls=str(write(path.with_suffix(".tar"), files)))
    if layout == "table":
        rows = [{"file_name": name, "text": "a"} for name in files if name.count(".") == 1]
        rows = [row for row in rows if row["file_name"].endswith("png")]
        files = {name: files[name] for name in files if not name.endswith("txt")}
        files["metadata.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    source = folder(path, files)
    return Mix(sources={"only": source}) if layout == "mix" else source


def module(source: Source, **changes: Any) -> ImageTextDataModule:
    settings: dict[str, Any] = {"image_size": 32, "batch_size": 4, "bucket_multiple": 16}
    settings |= {"ratios": [1.0], "val_fraction": 0.2, "mask": "file"} | changes
    data = ImageTextDataModule(source=source, **settings)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("keep_decoded", [False, True])
@pytest.mark.parametrize(
    ("layout", "kind", "crop"),
    [
        ("folder", "file", "random"),
        ("tar", "file", "saliency"),
        ("table", "file", "random"),
        ("mix", "file", "random"),
        ("folder", "alpha", "random"),
        ("tar", "alpha", "center"),
    ],
)
def test_a_mask_is_cropped_and_resized_like_its_image(
    tmp_path: Path, layout: str, kind: str, crop: str, keep_decoded: bool
) -> None:
    source = source_of(layout, tmp_path / "in", members(kind))
    data = module(source, mask=kind, crop=crop, crop_share=0.8, keep_decoded=keep_decoded)
    loader, left = data.train_dataloader(), set()
    for batch in [*(batch for _ in range(4) for batch in loader), *data.val_dataloader()]:
        assert batch["mask"].dtype == torch.uint8
        batch = data.on_after_batch_transfer(batch, 0)
        assert batch["mask"].shape == (len(batch["key"]), 1, 32, 32)
        gray = batch["image"][:, :1]
        expected = 1 - gray if kind == "alpha" else gray
        assert (batch["mask"] - expected).abs().max() < 0.012  # three of 255 levels
        left |= set(batch["mask"][:, 0, 16, 0].tolist())
    assert len(left) > 5  # a mask of another crop would be detected
    assert samples_and_errors(source)[1] == []  # no mask is counted as an unused image


def test_images_without_a_mask_count_everywhere(tmp_path: Path) -> None:
    files = {name: content for name, content in members("file").items() if name != "3.mask.png"}
    for batch in module(folder(tmp_path / "in", files), val_fraction=0).in_order("train"):
        for key, mask in zip(batch["key"], batch["mask"], strict=True):
            assert (mask.min() == 255) == (key == "3.png")
    plain = module(folder(tmp_path / "again", members("file")), mask=None)
    assert "mask" not in next(iter(plain.train_dataloader()))


def test_mask_files_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    source = folder(tmp_path / "in", members("alpha"))
    with pytest.raises(ValueError, match=r"^data\.mask='file', but none of \d training images has"):
        module(source)
    module(source, mask="alpha")


def test_a_damaged_mask_makes_its_sample_unreadable(tmp_path: Path) -> None:
    files = members("file") | {"0.mask.png": b"no image"}
    data = module(folder(tmp_path / "in", files), val_fraction=0)
    with pytest.warns(UserWarning, match=r"unreadable image: .*0\.png"):
        keys = {key for batch in data.in_order("train") for key in batch["key"]}
    assert len(keys) == 7


def test_a_resumed_run_has_the_same_masks_and_weights(tmp_path: Path) -> None:
    """Also of the samples that wait in buckets, which a checkpoint describes."""
    files = members("file") | {f"{i}.json": b'{"weight": %d}' % (i + 2) for i in range(8)}
    for layout in ("folder", "tar"):
        source = source_of(layout, tmp_path / layout, files)
        options: dict[str, Any] = {"ratios": [1.5, 2.0], "batch_size": 2}

        def batches(data: ImageTextDataModule, count: int) -> list[Any]:
            loader = data.train_dataloader()
            loaded = (batch for _ in range(count) for batch in loader)
            return [[b["key"], b["mask"].sum().item(), b["weight"].tolist()] for b in loaded]

        whole = batches(module(source, **options), 6)
        waiting = 0
        for consumed in (1, 2, 3):
            first, rest = (module(source, **options) for _ in range(2))
            loader = first.train_dataloader()
            list(islice((batch for _ in range(3) for batch in loader), consumed))
            state = json.loads(json.dumps(first.state_dict()))
            waiting += sum(len(rows) for _, rows in state["pending"])
            rest.load_state_dict(state)
            assert batches(rest, 6)[:8] == whole[consumed : consumed + 8]
        assert waiting


def test_areas_of_a_mask_are_averaged() -> None:
    mask = np.array([[0, 255, 255, 255], [0, 255, 0, 0]], np.uint8)
    assert crop_mask(mask, (2, 4), (0, 0, 4, 2), (1, 2)).tolist() == [[128, 128]]
    assert crop_mask(mask, (4, 8), (4, 0, 8, 2), (1, 1)).tolist() == [[255]]
    assert crop_mask(mask, (2, 4), (2, 0, 4, 2), (4, 2)).tolist() == [[255, 255]] * 2 + [[0, 0]] * 2


def test_masks_of_every_format_are_upright_and_gray() -> None:
    gray = Image.fromarray(ramp(6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    turned = np.rot90(np.asarray(gray), -1)
    for img in (gray, gray.convert("RGB"), gray.convert("RGBA")):
        np.testing.assert_array_equal(decode_gray(encode(img, "PNG")), gray)
        np.testing.assert_array_equal(decode_gray(encode(img, "PNG", exif=exif)), turned)
    black = Image.new("L", gray.size)
    with_alpha = encode(Image.merge("LA", (black, gray)), "PNG", exif=exif)
    np.testing.assert_array_equal(decode_alpha(with_alpha), turned)
    assert decode_alpha(image("a")) is None
    palette = encode(Image.new("P", (2, 2)), "PNG", transparency=0)
    np.testing.assert_array_equal(decode_alpha(palette), np.zeros((2, 2)))
    bits = Image.fromarray(np.array([[0, 65535]], np.uint16))
    assert decode_gray(encode(bits, "PNG")).tolist() == [[0, 255]]


@pytest.mark.parametrize("layout", ["json", "tar", "jsonl", "csv"])
def test_weights_come_from_json_and_tables(tmp_path: Path, layout: str) -> None:
    weights: dict[str, Any] = {"a": 2.5, "b": 0, "c": "", "d": None, "e": -1, "f": "3"}
    files = {f"{key}.jpg": image(key, 40, 40) for key in weights}
    if layout in ("json", "tar"):
        files |= {f"{k}.json": json.dumps({"weight": w}).encode() for k, w in weights.items()}
        files |= {f"{k}.txt": b"a" for k in weights}
    elif layout == "jsonl":
        rows = [{"file_name": f"{k}.jpg", "text": "a", "weight": w} for k, w in weights.items()]
        files["metadata.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    else:
        rows = [f"{k}.jpg,a,{'' if w is None else w}" for k, w in weights.items()]
        files["metadata.csv"] = "\n".join(["file_name,text,weight", *rows]).encode()
    source = source_of("tar" if layout == "tar" else "folder", tmp_path / "in", files)
    samples, bad = samples_and_errors(source)
    expected = {"a": 2.5, "b": 0.0, "c": 1.0, "d": 1.0, "f": 3.0}
    assert {sample.key.removesuffix(".jpg"): sample.weight for sample in samples} == expected
    assert [error.reason for error in bad] == ["negative weight"]
    for batch in module(source, mask=None, batch_size=1, val_fraction=0).in_order("train"):
        weight = expected[batch["key"][0].removesuffix(".jpg")]
        assert batch.get("weight", torch.ones(1)).tolist() == [weight]
        assert ("weight" in batch) == (weight != 1)


def test_build_keeps_masks_and_weights_and_check_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = members("file") | {"0.json": b'{"weight": 3}'}
    del files["1.mask.png"]
    before, _ = samples_and_errors(source := folder(tmp_path / "in", files))
    command = ["build", f"from={tmp_path / 'in'}", f"to={tmp_path / 'out'}", "num_workers=0"]
    assert run_program("data", command) == 0
    built = ShardSource(urls=str(tmp_path / "out"))
    after, _ = samples_and_errors(built)
    assert [sample.weight for sample in after] == [3, *[1] * 7]
    assert [sample.mask_size for sample in after] == [sample.mask_size for sample in before]
    for one, other in zip(before, after, strict=True):
        if one.mask_size:
            assert built.read(other.mask) == source.read(one.mask)
    check = ["check", "data=shards", f"data.urls={tmp_path / 'out'}", "data.max_upscale=null"]
    check += [f"output_dir={tmp_path / 'checked'}"]
    for more, line in (
        ([], "7 images with a mask, which data.mask=file uses\n"),
        (["data.mask=file"], "7 images with a mask\n"),
        (["data.mask=alpha"], "0 images with a mask\n"),
    ):
        capsys.readouterr()
        assert run_program("data", [*check, *more]) == 0
        output = capsys.readouterr().out
        assert line in output
        assert "1 image with a weight other than 1\n" in output
