"""Distillation: a student learns the jumps of its guided teacher, which never changes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import fit, stage_b, stage_c, training
from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.diffusion.distillation import HUBER
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.distillation import DistillationStage
from wuerstchen_pl.stages.stage import Batch

SEEDS = range(4)


def prior() -> Prior:
    """One that predicts something, unlike a new one."""
    torch.manual_seed(0)
    network = Prior(width=32, depth=2, num_heads=2, text_dim=16, dropout=0.0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network


def frozen(text_encoder: TextEncoder) -> TextEncoder:
    """With a source, without which a text encoder cannot be frozen."""
    text_encoder.source = Source(path="base", sha256="0" * 64)
    return text_encoder


def distilled(**options: Any) -> DistillationStage:
    torch.manual_seed(0)
    text = frozen(TextEncoder(width=16, depth=1, num_heads=2, context_length=8))
    teacher = prior()
    arguments: Any = {
        "stage_b": stage_b(), "prior": copy.deepcopy(teacher), "text_encoder": text,
        "teacher": teacher, "student_steps": 4, **training(1e-3), **options,
    }  # fmt: skip
    return DistillationStage(**arguments)


def teacher_of(stage: DistillationStage) -> PriorSampler:
    sampler = StageC.prior_sampler(stage)
    sampler.prior = stage.frozen["teacher"]  # type: ignore[assignment]
    sampler.predict_noise = sampler.prior.predict_noise
    return sampler


def sampled(sampler: PriorSampler, batch: Batch, steps: int, guidance_scale: float) -> Tensor:
    return sampler(
        batch["caption"], 32, 32, steps, guidance_scale=guidance_scale, seed=list(SEEDS),
        sampler="ddim", progress=False,
    )[0]  # fmt: skip


def test_a_copy_of_the_teacher_has_no_error_in_steps_of_the_teacher(batch: Batch) -> None:
    copied = distilled(student_steps=8, teacher_steps=1, guidance_scale=0.0)
    assert copied.validation_losses(batch)[1].max() < 1e-8
    for other in ({"teacher_steps": 4}, {"guidance_scale": 4.0}):
        options: Any = {"student_steps": 8, "teacher_steps": 1, "guidance_scale": 0.0, **other}
        assert distilled(**options).validation_losses(batch)[1].mean() > 1e-3


def test_training_changes_the_student_and_no_bit_of_its_teacher(batch: Batch) -> None:
    stage = distilled()
    before, teacher = (copy.deepcopy(net.state_dict()) for net in (stage.prior, prior()))
    fit(stage, batch, 3)
    after = stage.frozen["teacher"].state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(after[name], teacher[name]) for name in teacher)
    changed = {n for n, w in stage.prior.state_dict().items() if not torch.equal(w, before[n])}
    assert changed == {name for name, _ in stage.prior.named_parameters()}
    assert {name.partition(".")[0] for name in stage.state_dict()} == {"prior"}


def test_cached_captions_need_no_text_encoder(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, cached = distilled(), distilled()
    losses = encoded.validation_losses(batch)[1]
    with_cache: Any = {
        **batch, "text": cached.text(batch["caption"]),
        "empty_text": cached.text([""]).repeat(4, 1, 1),
    }  # fmt: skip
    monkeypatch.setattr(cached, "text", None)
    torch.testing.assert_close(cached.validation_losses(with_cache)[1], losses)


def test_masked_positions_do_not_count(batch: Batch) -> None:
    stage = distilled(teacher_steps=2)
    t, noise = torch.full((4,), 0.6), torch.randn(4, 16, 4, 4)
    text, x0 = stage.text(batch["caption"]), torch.randn(4, 16, 4, 4)
    mask = torch.zeros(4, 1, 32, 32)
    assert float(stage.loss(x0, t, noise, text, mask).detach().abs().max()) == 0
    mask[:, :, :16] = 1
    with torch.no_grad():
        losses = [stage.loss(x0, t, noise, text, m) for m in (mask, 1 - mask, None)]
    upper, lower, whole = ((loss + HUBER).square() - HUBER**2 for loss in losses)  # the errors
    assert not torch.allclose(upper, lower)
    torch.testing.assert_close(whole, (upper + lower) / 2)


@pytest.mark.slow
def test_few_steps_of_the_student_approach_many_guided_ones_of_the_teacher(batch: Batch) -> None:
    trained = stage_c(prior=prior(), caption_drop_prob=0.2)
    fit(trained, batch, 300)
    teacher = trained.prior
    assert isinstance(teacher, Prior)
    stage = distilled(
        prior=copy.deepcopy(teacher), teacher=teacher, text_encoder=frozen(trained.text_encoder),
        student_steps=2, teacher_steps=8, guidance_scale=3.0,
    )  # fmt: skip
    target = sampled(teacher_of(stage), batch, 16, 3.0)
    samples = [sampled(teacher_of(stage), batch, 2, scale) for scale in (0.0, 3.0)]
    fit(stage, batch, 300)
    samples.append(sampled(stage.prior_sampler(), batch, 2, 0.0))
    *errors, student = [float((x - target).square().mean()) for x in samples]
    assert student < 0.3 * min(errors), (errors, student)


def test_grids_have_the_steps_of_the_student(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, options = distilled(student_steps=3), []
    sample = DistillationStage.sample

    def recorded(self: DistillationStage, *args: Any, **kwargs: Any) -> Tensor:
        options.append({name: kwargs.get(name) for name in ("num_steps", "guidance_scale")})
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(DistillationStage, "sample", recorded)
    stage.example_grid(batch)  # without the warning that other steps cause
    assert options == [{"num_steps": 3, "guidance_scale": 0.0}] * 2


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({"num_inference_steps": 4, "guidance_scale": 2.0}, "4 with guidance 2"),
        ({"num_inference_steps": 9, "guidance_scale": 0.0}, "9 with no guidance"),
        ({"timesteps": [1.0, 0.5, 0.0]}, "2 with guidance 8"),
    ],
)
def test_guidance_or_many_steps_are_a_warning(options: dict[str, Any], settings: str) -> None:
    sampler = distilled().prior_sampler()
    with pytest.warns(UserWarning, match=f"without guidance, not for {settings}; use"):
        sampler("red apple", 32, 32, seed=0, progress=False, **options)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "adapter": ({"adapter": Adapter(rank=2)}, "trains the prior alone; remove stage.adapter"),
    "text": ({"train_text_encoder": True}, "remove stage.train_text_encoder"),
    "p2": ({"p2": "code"}, "p2=code is not a weight of distillation; set stage.p2=none"),
    "no steps": ({"student_steps": 0}, "student_steps=0 is out of range; use 1 to 8"),
    "steps": ({"student_steps": 9}, "student_steps=9 is out of range; use 1 to 8"),
    "teacher": ({"teacher_steps": 0}, "teacher_steps=0 is out of range"),
    "too many": (
        {"student_steps": 8, "teacher_steps": 33}, "with student_steps=8, use 1 to 32",
    ),
    "guidance": ({"guidance_scale": float("inf")}, "guidance_scale=inf is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_distilled_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        distilled(**options)


def test_a_student_without_a_teacher_is_only_sampled(batch: Batch) -> None:
    stage = distilled(teacher=None)
    stage.sample(["frog"], size=(32, 32), seeds=[0], **stage.grid_sampling)
    with pytest.raises(ValueError, match="a student is trained by its teacher; set teacher"):
        stage.validation_losses(batch)
