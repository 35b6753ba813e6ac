"""Prior preservation: nothing to preserve at first, and a caption that keeps its meaning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import NO_GRIDS, NO_PLOT, SMALL_DATA, run_program
from wuerstchen_pl.formats.trained_stage import load_stage

CAPTION = "green frog"
COMMAND = [
    "stage=c", "data=openmoji", *SMALL_DATA, NO_GRIDS, NO_PLOT, "trainer.accelerator=cpu",
    "trainer.max_steps=40", "validate_every_steps=40", "checkpoint_every_steps=40", "logger=csv",
    "stage.optimizer.lr=0.03", "stage.lr_schedule.warmup_steps=0", "trainer.log_every_n_steps=1",
    "cache=false", "stage.ema.decay=0", "stage.caption_drop_prob=0",
]  # fmt: skip


def prediction(run: Path) -> Tensor:
    """What a run's Stage C predicts for the caption."""
    stage: Any = load_stage(source=run, stage="c", ema=False)
    rng = torch.Generator().manual_seed(3)
    xt = torch.randn(16, 16, 4, 4, generator=rng)
    t = torch.linspace(0.2, 0.9, 16)
    with torch.no_grad():
        return stage.prior(xt, t, stage.text([CAPTION]).expand(16, -1, -1))


@pytest.mark.slow
def test_a_caption_keeps_its_meaning_while_an_adapter_is_trained(
    cascade: Path, tmp_path: Path
) -> None:
    base = [f"init_from={cascade / 'c'}", f"paths.root={tmp_path}"]
    assert run_program("train", ["experiment=lora", *base, *COMMAND]) == 0
    kept = [f"stage.preservation.caption={CAPTION}", "stage.preservation.weight=20"]
    assert run_program("train", ["experiment=dreambooth", *base, *kept, *COMMAND]) == 0
    expected = prediction(cascade / "c")
    changes = [
        float((prediction(tmp_path / name / "c") - expected).square().mean().sqrt())
        for name in ("lora", "dreambooth")
    ]
    assert changes[1] < 0.5 * changes[0]
    rows = (tmp_path / "dreambooth/c/metrics.csv").read_text().splitlines()
    losses = [float(row.split(",")[2]) for row in rows if ",train/preservation," in row]
    assert losses[0] == 0
    assert 0 < losses[-1] < 1


def test_the_caption_must_be_set_and_needs_an_adapter(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = [f"init_from={cascade / 'c'}", f"paths.root={tmp_path}", *COMMAND]
    assert run_program("train", ["experiment=dreambooth", *base]) == 1
    assert "stage.preservation.caption is missing; set" in capsys.readouterr().err
    keys = ["experiment=dreambooth", "stage.preservation.caption=a", "stage.adapter=null"]
    assert run_program("train", [*keys, *base]) == 1
    assert "preservation keeps what the model predicts without its adapter" in (
        capsys.readouterr().err
    )
