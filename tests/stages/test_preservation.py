"""Prior preservation: nothing to preserve at first, and a caption that keeps its meaning."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import NO_GRIDS, NO_PLOT, SMALL_DATA, run_program
from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.diffusion.objective import p2_weight
from wuerstchen_pl.diffusion.schedule import sample_timesteps
from wuerstchen_pl.formats.pretrained import load_network
from wuerstchen_pl.formats.trained_stage import load_compressor, load_stage
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.stages.batch_rng import BatchRNG
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.preservation import PriorPreservation

CAPTION = "green frog"
STEP: dict[str, Any] = {"seed": 0, "step": (5, 0), "rows": 1}
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
    kept = [f"stage.preservation.captions=[{CAPTION}]", "stage.preservation.weight=20"]
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


def test_captions_must_be_set_and_need_an_adapter(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = [f"init_from={cascade / 'c'}", f"paths.root={tmp_path}", *COMMAND]
    assert run_program("train", ["experiment=dreambooth", *base]) == 1
    assert "stage.preservation.captions is missing; set" in capsys.readouterr().err
    keys = ["experiment=dreambooth", "stage.preservation.captions=[a]", "stage.adapter=null"]
    assert run_program("train", [*keys, *base]) == 1
    assert "preservation keeps what the model predicts without its adapter" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("text_too", [pytest.param(False, marks=pytest.mark.slow), True])
def test_class_images_are_those_of_the_base_model(text_too: bool, cascade: Path) -> None:
    base: Any = load_stage(source=cascade / "c", stage="c")
    captions, seeds = [CAPTION, "red heart", CAPTION], [0, 1, 2]
    expected = base.sample(captions, size=(64, 64), seeds=seeds)
    preservation = PriorPreservation(captions=captions[:2], num_class_images=3, image_size=64)
    tuned = with_adapter(cascade / "c", preservation, text_too)
    preservation.draw_class_images(tuned)
    assert preservation.class_images is not None
    torch.testing.assert_close(preservation.class_images, base.scaling.normalize(expected))
    assert not torch.allclose(tuned.sample(captions, size=(64, 64), seeds=seeds), expected)


@pytest.mark.parametrize("text_too", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_loss_is_that_of_class_images_with_their_captions(
    text_too: bool, cascade: Path
) -> None:
    captions = [CAPTION, "red heart"]
    preservation = PriorPreservation(captions=captions, num_class_images=2, image_size=64, weight=3)
    tuned = with_adapter(cascade / "c", preservation, text_too)
    preservation.draw_class_images(tuned)
    images = preservation.class_images
    assert images is not None
    loss = preservation.loss(tuned, torch.full_like(images[:1], torch.nan), BatchRNG(**STEP))

    rng = BatchRNG(**STEP)
    which = (rng.uniform() * 2).long()
    t = sample_timesteps(rng.uniform())
    xt = tuned.schedule.add_noise(images[which], t, rng.noise(images[which]))
    text = tuned.text([captions[which]])
    base_text = load_stage(source=cascade / "c", stage="c").text([captions[which]])
    assert torch.equal(text, base_text) == (not text_too)
    change = tuned.prior(xt, t, text) - base_prediction(tuned, xt, t, base_text)
    assert change.abs().max() > 0
    expected = 3 * p2_weight(tuned.schedule, t, tuned.p2) * change.square().mean()
    torch.testing.assert_close(loss, expected.squeeze())


def with_adapter(run: Path, preservation: PriorPreservation, text_too: bool) -> Any:
    """Stage C of a run with an adapter that changes it, and one of its text encoder."""
    tuned = StageC(
        stage_b=load_compressor(source=run),
        prior=cast(Prior, load_network(source=run, part="prior")),
        text_encoder=cast(TextEncoder, load_network(source=run, part="prior_text_encoder")),
        adapter=Adapter(rank=2),
        text_adapter=Adapter(rank=2, targets=["*.attn.*"]) if text_too else None,
        preservation=preservation,
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return tuned.eval()


def base_prediction(tuned: Any, *inputs: Tensor) -> Tensor:
    with torch.no_grad(), tuned.adapters["prior"].disabled(tuned.prior):
        return tuned.prior(*inputs)
