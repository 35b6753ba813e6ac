"""Weights and latents that are not finite are refused by name, by every program that uses them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import run_program
from wuerstchen_pl.checkpointing.load import find_checkpoint
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline

Program = Callable[..., int]
WEIGHT = "stem.weight"


def poison(tensor: Tensor) -> None:
    tensor.view(-1)[:2] = torch.tensor([torch.nan, torch.inf])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, cascade: Path) -> dict[str, Path]:
    """One model with two values that are not finite, as a run and in the native format."""
    root = tmp_path_factory.mktemp("nonfinite")
    assert run_program("export", [f"ckpt={cascade / 'c'}", f"to={root / 'native'}"]) == 0
    file = root / "native/prior/model.safetensors"
    tensors = load_file(file)
    poison(tensors[WEIGHT])
    save_file(tensors, file)
    shutil.copytree(cascade, root / "default")
    checkpoint = find_checkpoint(root / "default/c")
    content = torch.load(checkpoint, weights_only=True)
    poison(content["ema"]["shadow"][f"prior.{WEIGHT}"])
    torch.save(content, checkpoint)
    checkpoint.with_name(f"{checkpoint.name}.sha256").unlink()
    return {"native": root / "native", "run": root / "default/c"}


COMMANDS = (
    "sample model={model} output_dir={out} prompt=x device=cpu",
    "evaluate model={model} output_dir={out} metric=[fid] reference={images} prompts={prompts} "
    "device=cpu fid_features=random fid_features.widths=[2]",
    "convert from={model} to={out}",
)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *((command, kind) for command in COMMANDS for kind in ("native", "run")),
        ("export ckpt={model} to={out}", "run"),
    ],
)
def test_weights_that_are_not_finite_are_named(
    command: str, kind: str, models: dict[str, Path], tmp_path: Path, program: Program,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n" * 4)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(images / f"{i}.png")
    out = tmp_path / "out"
    name, *arguments = command.format(
        model=models[kind], out=out, prompts=prompts, images=images
    ).split()
    assert program(name, *arguments) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"has 2 values in prior.{WEIGHT} (of " in line
    assert not out.exists() or not [p for p in out.rglob("*") if p.is_file()]


@pytest.mark.parametrize("part", ["prior", "decoder"])
def test_latents_that_overflow_are_an_error(
    part: str, cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = WuerstchenPipeline.from_pretrained(cascade / "c")
    sampler = getattr(pipeline, part)
    name = "predict_noise" if part == "prior" else "predict"
    predict = getattr(sampler, name)

    def overflowing(*args: Any, **kwargs: Any) -> Tensor:
        return predict(*args, **kwargs) * torch.inf

    monkeypatch.setattr(sampler, name, overflowing)
    message = f"the {part} computed latents that are not finite in torch.float32; use float32"
    with pytest.raises(ValueError, match=message):
        pipeline("x", num_inference_steps=2, prior_num_inference_steps=2)
