"""From one's own photographs to images of them, by the commands of docs/getting-started.md."""

import colorsys
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import SMALL_NETWORK
from tests.data.factories import photo
from wuerstchen_pl import WuerstchenPipeline

COLORS = ("red", "yellow", "green", "cyan", "blue", "magenta")
STEPS = 60


def write_photographs(root: Path) -> Path:
    """24 photographs with four sizes and six colors."""
    root.mkdir()
    for number in range(24):
        size = ((160, 120), (120, 160), (128, 128), (200, 120))[number % 4]
        tint = np.array(colorsys.hsv_to_rgb(number % 6 / 6, 1, 1))
        pixels = np.asarray(photo(*size)) * (0.3 + 0.7 * tint)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number:02d}.jpg")
    return root


def write_captions(root: Path) -> None:
    for number in range(24):
        (root / f"{number:02d}.txt").write_text(f"{COLORS[number % 6]} waves\n")


def metric(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row[2]) for row in csv.reader(file) if row[1] == name]


@pytest.mark.slow
def test_photographs_become_a_model_that_draws(
    program: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    photographs = write_photographs(tmp_path / "images")
    data = ["data=folder", f"data.root={photographs}"]
    small = ["trainer.accelerator=cpu", "stage.optimizer.lr=3e-3", "data.num_workers=0"]
    few = [*small, f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1"]

    assert program("data", "check", "stage=a", *data) == 0
    assert "24 images left" in capsys.readouterr().out
    assert program("train", "stage=a", *data, "name=mine", *few, *SMALL_NETWORK["a"]) == 0
    assert program("data", "check", *data) == 1  # Stage C needs captions
    write_captions(photographs)
    for stage in "bc":
        arguments = [f"stage={stage}", *data, "name=mine", *few, *SMALL_NETWORK[stage]]
        assert program("train", *arguments) == 0
    runs = tmp_path / "outputs/mine"
    psnr = metric(runs / "a", "val/psnr")
    assert psnr[-1] > psnr[0] + 3
    for stage, factor in {"b": 0.3, "c": 0.7}.items():
        loss = metric(runs / stage, "val/loss")
        assert loss[-1] < factor * loss[0], stage
    for stage in "abc":
        assert (runs / stage / f"grids/step{STEPS:07d}.png").is_file()

    few_steps = ["sample.prior_steps=4", "sample.decoder_steps=2"]
    model = f"model={runs / 'c'}"
    assert program("sample", model, "prompt=red waves", *few_steps) == 0
    evaluation = ["metric=[reconstruction,retrieval]", "num_prompts=4", *few_steps]
    assert program("evaluate", model, *evaluation, "output_dir=evaluation") == 0
    assert (tmp_path / "evaluation/index.html").is_file()
    assert program("export", f"ckpt={runs / 'c'}", "to=models/mine", "license=cc0-1.0") == 0
    pipe = WuerstchenPipeline.from_pretrained("models/mine")
    image = pipe("red waves", 64, 64, seed=0, num_inference_steps=2, prior_num_inference_steps=4)
    assert image.images[0].size == (64, 64)

    tuned = ["init_from=models/mine", "paths.stage_b=models/mine", "name=tuned"]
    assert program("train", "stage=c", *data, *tuned, *few, *SMALL_NETWORK["c"]) == 0
    first = metric(tmp_path / "outputs/tuned/c", "val/loss")[0]
    assert first < factor * metric(runs / "c", "val/loss")[0]  # it starts from what was learned
