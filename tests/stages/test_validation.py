"""Validation with EMA weights, logged means, gradient norms, and frozen precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from tests.stages.conftest import STAGES, fit
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.diffusion.schedule import CosineSchedule
from wuerstchen_pl.distributed.strategy import FSDP2Strategy
from wuerstchen_pl.stages.ema import EMA


def loader(batch: Batch, length: int) -> DataLoader:
    return DataLoader([batch] * length, batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STAGES)
def test_ema_weights_are_swapped_in_once_per_validation(
    name: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = STAGES[name]()
    fit(stage, batch, 2)
    swaps: list[int] = []
    validation_weights: list[Tensor] = []
    swapped_in, validate = EMA.swapped_in, type(stage).validate

    @contextmanager
    def counting_swap(self: EMA, module: nn.Module) -> Iterator[None]:
        swaps.append(1)
        with swapped_in(self, module):
            yield

    def recording_validate(self: L.LightningModule, batch: Batch) -> None:
        validation_weights.append(next(self.parameters()).detach().clone())
        validate(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(EMA, "swapped_in", counting_swap)
    monkeypatch.setattr(type(stage), "validate", recording_validate)
    raw = next(stage.parameters()).detach().clone()
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(stage, loader(batch, 3), verbose=False)
    assert len(swaps) == 1
    assert len(validation_weights) == 3
    shadow = stage.ema.shadow[next(stage.named_parameters())[0]]
    assert not torch.equal(shadow, raw)
    assert all(torch.equal(weights, shadow) for weights in validation_weights)
    assert torch.equal(next(stage.parameters()), raw)


def test_raw_weights_are_restored_after_a_failed_validation(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = STAGES["c"]()
    fit(stage, batch, 2)
    raw = [p.detach().clone() for p in stage.parameters()]

    def failing_validate(*args: object) -> None:
        raise RuntimeError("no validation")

    monkeypatch.setattr(type(stage), "validate", failing_validate)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(RuntimeError, match="no validation"):
        trainer.validate(stage, loader(batch, 1), verbose=False)
    assert all(torch.equal(p, q) for p, q in zip(stage.parameters(), raw, strict=True))


def test_validation_does_not_gather_all_sharded_weights(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation step gathers block by block, without explicit calls of ``unshard``."""
    plain, sharded = STAGES["c"](), STAGES["c"]()
    unshard_calls: list[FSDPModule] = []
    unshard = FSDPModule.unshard

    def recording_unshard(self: FSDPModule, **options: object) -> object:
        unshard_calls.append(self)
        return unshard(self, **options)  # type: ignore[arg-type]

    losses = []
    for stage, strategy in ((plain, "auto"), (sharded, FSDP2Strategy())):
        options = {"strategy": strategy, "accelerator": "cpu", "devices": 1, "logger": False}
        trainer = L.Trainer(
            max_steps=2, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
            **options,  # type: ignore[arg-type]
        )  # fmt: skip
        monkeypatch.setattr(FSDPModule, "unshard", recording_unshard)
        trainer.fit(stage, loader(batch, 2), loader(batch, 2))
        monkeypatch.undo()
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert unshard_calls == []
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_the_logged_loss_is_the_mean_over_micro_batches(name: str, batch: Batch) -> None:
    stage = STAGES[name]()
    logged: dict[str, Tensor] = {}
    stage.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign]
    means: list[Tensor] = []
    log_means = stage.log_means

    def recording_log(values: dict[str, Tensor]) -> None:
        means.append(values["loss"].detach().clone())
        log_means(values)

    stage.log_means = recording_log  # type: ignore[method-assign]
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=4, log_every_n_steps=1,
        logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batches: list[Batch] = [{**batch, "image": batch["image"] * k / 4} for k in (1, 2, 3, 4)]
    trainer.fit(stage, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert len(means) == 4
    assert len({float(loss) for loss in means}) == 4
    assert torch.allclose(logged["train/loss"], torch.stack(means).mean(), rtol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_gradient_norm_is_computed_once_per_step(
    clip: float | None, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wuerstchen_pl.callbacks.skip_nonfinite import SkipNonFiniteGrads

    calls: list[int] = []
    total_norm = nn.utils.get_total_norm

    def counting_norm(*args: object, **options: object) -> Tensor:
        calls.append(1)
        return total_norm(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(nn.utils, "get_total_norm", counting_norm)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", None)  # it would compute the norm again
    stage = STAGES["a"]()
    fit(stage, batch, 3, callbacks=[SkipNonFiniteGrads()], gradient_clip_val=clip)
    assert len(calls) == 3 * len(stage.parameter_groups())


@pytest.mark.parametrize("name", ["b", "c", "ldm"])
@pytest.mark.parametrize(("precision", "exact"), [("float32", True), ("bfloat16", False)])
def test_frozen_encoders_compute_in_frozen_precision(
    precision: str, exact: bool, name: str, batch: Batch
) -> None:
    """Independently of the trainer's precision, so that the targets equal cached ones."""
    stage = STAGES[name](frozen_precision=precision)
    with torch.no_grad():
        frozen = stage.stage_a if name == "b" else stage
        expected = frozen.encode(batch["image"])
    with torch.autocast("cpu", torch.bfloat16):
        latents = stage.latents(batch)
    assert torch.equal(latents, expected) == exact
    assert torch.allclose(latents, expected, atol=0.05)


def test_semantic_latents_are_noised_at_times_below_one_half(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = STAGES["b"](semantic_noise_prob=1.0)
    times: list[Tensor] = []
    corrupt = stage.corrupt

    def recording_corrupt(semantic: Tensor, uniform: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        times.append(t)
        return corrupt(semantic, uniform, t, noise)

    monkeypatch.setattr(stage, "corrupt", recording_corrupt)
    fit(stage, batch, 40)
    t = torch.cat(times)
    assert 0 <= t.min() < 0.02
    assert 0.48 < t.max() < 0.5
    assert float(CosineSchedule().alpha_bar(t).min()) > 0.48
