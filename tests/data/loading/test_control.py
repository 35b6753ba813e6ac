"""Control images from files and tar files to batches."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import run_program
from tests.data.factories import encode
from tests.data.loading.test_masks import folder, module, ramp, source_of
from tests.data.sources.reading import samples_and_errors
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Source


def members(count: int = 8) -> dict[str, bytes]:
    """Files of gray images, whose control images are red where they are light."""
    files = {}
    for i in range(count):
        gray = ramp(96 + 8 * i, 64)
        red = Image.fromarray(np.stack([gray, 0 * gray, 255 - gray], axis=2))
        files[f"{i}.txt"] = f"number {i}".encode()
        files[f"{i}.png"] = encode(Image.fromarray(gray), "PNG")
        # of another size, as a control image may be
        files[f"{i}.control.png"] = encode(red.resize((gray.shape[1] * 3 // 2, 96)), "PNG")
    return files


def controlled(source: Source, **changes: Any) -> ImageTextDataModule:
    return module(source, mask=None, control=True, **changes)


@pytest.mark.parametrize("keep_decoded", [False, True])
@pytest.mark.parametrize(
    ("layout", "crop"),
    [("folder", "random"), ("tar", "saliency"), ("table", "random"), ("mix", "center")],
)
def test_a_control_image_is_cropped_and_resized_like_its_image(
    tmp_path: Path, layout: str, crop: str, keep_decoded: bool
) -> None:
    source = source_of(layout, tmp_path / "in", members())
    data = controlled(source, crop=crop, crop_share=0.8, keep_decoded=keep_decoded)
    loader, left = data.train_dataloader(), set()
    for batch in [*(batch for _ in range(4) for batch in loader), *data.val_dataloader()]:
        assert batch["control"].dtype == torch.uint8
        batch = data.on_after_batch_transfer(batch, 0)
        gray = batch["image"][:, :1]
        expected = torch.cat([gray, 0 * gray, 1 - gray], dim=1)
        assert (batch["control"] - expected).abs().max() < 0.016  # four of 255 levels
        left |= set(batch["control"][:, 0, 16, 0].tolist())
    assert len(left) > 5  # a control image of another crop would be detected
    assert samples_and_errors(source)[1] == []  # none is counted as an unused image


def test_a_resumed_run_has_the_same_control_images(tmp_path: Path) -> None:
    """Also of the samples that wait in buckets, which a checkpoint describes."""
    for layout in ("folder", "tar"):
        source = source_of(layout, tmp_path / layout, members())

        def sums(data: ImageTextDataModule, count: int) -> list[float]:
            loader = data.train_dataloader()
            return [b["control"].sum().item() for _ in range(count) for b in loader]

        options: dict[str, Any] = {"ratios": [1.5, 2.0], "batch_size": 2}
        whole, waiting = sums(controlled(source, **options), 6), 0
        for consumed in (1, 2, 3):
            first, rest = (controlled(source, **options) for _ in range(2))
            loader = first.train_dataloader()
            list(islice((batch for _ in range(3) for batch in loader), consumed))
            state = json.loads(json.dumps(first.state_dict()))
            waiting += sum(len(rows) for _, rows in state["pending"])
            rest.load_state_dict(state)
            assert sums(rest, 6)[:8] == whole[consumed : consumed + 8]
        assert waiting


def test_images_without_a_control_image_are_refused_by_name(tmp_path: Path) -> None:
    files = members()
    del files["3.control.png"]
    source = folder(tmp_path / "in", files)
    message = r"the control image of 1 of 8 images is missing, such as that of \S+/3\.png; save"
    with pytest.raises(ValueError, match=message):
        controlled(source)
    assert "control" not in next(iter(module(source, mask=None).train_dataloader()))


def test_a_damaged_control_image_makes_its_sample_unreadable(tmp_path: Path) -> None:
    files = members() | {"0.control.png": b"no image"}
    data = controlled(folder(tmp_path / "in", files), val_fraction=0)
    with pytest.warns(UserWarning, match=r"unreadable image: .*0\.png"):
        keys = {key for batch in data.in_order("train") for key in batch["key"]}
    assert len(keys) == 7


def test_build_keeps_control_images_and_check_counts_them(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = folder(tmp_path / "in", members())
    command = ["build", f"from={tmp_path / 'in'}", f"to={tmp_path / 'out'}", "num_workers=0"]
    assert run_program("data", command) == 0
    built = ShardSource(urls=str(tmp_path / "out"))
    (before, _), (after, _) = samples_and_errors(source), samples_and_errors(built)
    for one, other in zip(before, after, strict=True):
        assert built.read(other.control) == source.read(one.control)
    check = ["check", "data=shards", f"data.urls={tmp_path / 'out'}", "data.max_upscale=null"]
    capsys.readouterr()
    assert run_program("data", [*check, f"output_dir={tmp_path / 'checked'}"]) == 0
    assert "8 images with a control image\n" in capsys.readouterr().out
