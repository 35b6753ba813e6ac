"""The paper's baseline: trained, sampled and evaluated with the same commands as Stage C."""

import json
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.test_config import composed
from tests.conftest import run_program, small
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.models.layers import Block
from wuerstchen_pl.models.unet import UNet
from wuerstchen_pl.pipelines.loading import load_pipeline


@pytest.fixture(scope="module")
def baseline(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("baseline")
    data = f"paths.data={cascade.parent / 'data'}"
    stage_a = f"paths.stage_a={cascade / 'a'}"
    assert run_program("train", [*small("ldm", root), stage_a, data]) == 0
    return root / "default/ldm"


def test_the_baseline_has_the_papers_levels() -> None:
    cfg = composed("experiment=baseline_ldm")
    with torch.device("meta"):
        net: UNet = hydra.utils.instantiate(cfg.stage.prior, _convert_="all")
    down, up = net.net.down, list(reversed(net.net.up))
    assert [len(level.blocks) for level in down] == [2, 4, 14, 4]
    assert [len(level.blocks) for level in up] == [3, 5, 15, 5]
    blocks = [level.blocks[0] for level in down]
    assert [block.res.depthwise.in_channels for block in blocks] == [320, 640, 1280, 1280]
    assert [block.attn.attention.num_heads for block in blocks] == [5, 10, 20, 20]
    assert sum(isinstance(module, Block) for module in net.modules()) == 52
    # f8: images of 512 px are 64 x 64 positions of the first level
    assert net.size_multiple == 2 * 2**3


def test_text_and_time_reach_every_block() -> None:
    net = UNet(
        widths=[8, 16], num_blocks=[1, 1], num_up_blocks=[2, 1], num_heads=[2, 2], cond_dim=8,
        text_dim=4,
    ).eval()  # fmt: skip
    block_inputs = net.inputs(torch.tensor([0.3]), torch.randn(1, 3, 4))
    assert len(block_inputs) == 5
    assert all(b.cond is not None and b.semantic is None for b in block_inputs)


def test_a_wrong_number_of_up_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="have 2, 2, 1, 2, 2 entries"):
        UNet(widths=[8, 8], num_blocks=[1, 1], num_up_blocks=[1], num_heads=[2, 2], cond_dim=8,
             text_dim=4)  # fmt: skip


@pytest.mark.slow
def test_the_command_generates_the_same_image_as_the_stage(baseline: Path, tmp_path: Path) -> None:
    overrides = [f"model={baseline}", f"output_dir={tmp_path}", "prompt=red apple", "seed=5"]
    overrides += ["sample.prior_steps=3", "height=64", "width=48"]
    assert run_program("sample", overrides) == 0
    image = np.asarray(Image.open(next(tmp_path.glob("0000-*.png")))).astype(int)
    pipeline = load_pipeline(str(baseline), device="cpu")
    stage: Any = load_stage(source=baseline, stage="ldm")
    latents = stage.sample(["red apple"], size=(64, 48), seeds=[5], num_steps=3)
    expected = stage.decode_semantic(latents, size=(64, 48), seeds=[5], captions=["red apple"])
    assert pipeline.size_multiple == 16
    assert image.shape == (64, 48, 3)
    assert np.abs(image - expected[0].permute(1, 2, 0).numpy() * 255).max() < 1


@pytest.mark.slow
def test_a_sweep_evaluates_the_baseline_and_the_cascade(
    baseline: Path, cascade: Path, tmp_path: Path
) -> None:
    overrides = ["-m", f"model={cascade / 'c'},{baseline}", f"output_dir={tmp_path}"]
    overrides += ["num_prompts=3", "metric=[retrieval,reconstruction,validation_loss]"]
    overrides += ["sample.prior_steps=2", "sample.decoder_steps=1"]
    assert run_program("evaluate", overrides) == 0
    of_cascade, of_baseline = (
        json.loads((tmp_path / f"{number}/metrics.json").read_text())["metrics"]
        for number in (0, 1)
    )
    assert {"stage_ldm/loss", "retrieval/top1", "stage_a/psnr"} <= of_baseline.keys()
    assert not [name for name in of_baseline if name.startswith(("stage_b", "stage_c"))]
    assert of_baseline["stage_a/psnr"] == of_cascade["stage_a/psnr"]  # both use the same Stage A
    log = (baseline / "metrics.csv").read_text().splitlines()
    logged = [float(line.split(",")[2]) for line in log if ",val/loss," in line]
    assert of_baseline["stage_ldm/loss"]["value"] == pytest.approx(logged[-1], rel=1e-5)


def test_a_baseline_cannot_be_exported_as_a_cascade(
    baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_program("export", [f"ckpt={baseline}", f"to={tmp_path / 'mine'}"]) == 1
    assert "is a run of stage=ldm, which no model format supports" in capsys.readouterr().err
