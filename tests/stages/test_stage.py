"""Properties of every stage."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import STAGES, fit
from wuerstchen_pl.batch import num_unique_samples
from wuerstchen_pl.models.activations import checkpoint_activations
from wuerstchen_pl.models.wrapping import find_blocks
from wuerstchen_pl.pipelines.loading import pipeline_from_stage
from wuerstchen_pl.stages.captions import encode_captions
from wuerstchen_pl.stages.stage import Batch, Stage, WarmupCosine


def validation_loss(stage: Stage, batch: Batch) -> float:
    """The loss of the EMA weights at fixed times and noise."""
    logged: dict[str, torch.Tensor] = {}
    stage.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    stage.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign]
    with torch.no_grad():
        stage.eval().validation_step(batch, 0)
    del stage.log, stage.log_dict
    return float(logged["val/loss"])


@pytest.mark.parametrize(
    ("name", "steps", "max_ratio"),
    [
        pytest.param("a", 300, 0.4, marks=pytest.mark.slow),
        pytest.param("b", 120, 0.8, marks=pytest.mark.slow),
        pytest.param("b_tokens", 120, 0.8, marks=pytest.mark.slow),
        ("c", 60, 0.5),
        pytest.param("ldm", 100, 0.8, marks=pytest.mark.slow),
    ],
)
def test_one_batch_overfits(name: str, steps: int, max_ratio: float, batch: Batch) -> None:
    stage = STAGES[name]()
    fit(stage, batch, 1)
    before = validation_loss(stage, batch)
    stage = STAGES[name]()
    fit(stage, batch, steps)
    assert validation_loss(stage, batch) < max_ratio * before


@pytest.mark.parametrize("name", STAGES)
def test_every_trained_parameter_changes_and_no_frozen_one(name: str, batch: Batch) -> None:
    options = {"adversarial_start_step": 0} if name == "a" else {}
    stage = STAGES[name](**options)
    # gates and heads initialized to zero would block gradients to the layers before them
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    frozen = {
        f"{part}.{key}": tensor.clone()
        for part, module in stage.frozen.present().items()
        for key, tensor in module.state_dict().items()
    }
    before = {key: p.detach().clone() for key, p in stage.named_parameters()}
    fit(stage, batch, 3)
    unchanged = [k for k, p in stage.named_parameters() if torch.equal(before[k], p.detach())]
    assert not unchanged
    for part, module in stage.frozen.present().items():
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, frozen[f"{part}.{key}"]), f"{part}.{key} changed"
        assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("name", STAGES)
def test_frozen_networks_are_on_the_device_of_the_stage(name: str) -> None:
    stage = STAGES[name]().to("meta")
    assert stage.device.type == "meta"
    frozen = [part for part in stage.frozen.present().values() if isinstance(part, Stage)]
    assert all(part.device.type == "meta" for part in frozen)
    if name in ("c", "ldm"):
        assert pipeline_from_stage(stage).placement.device.type == "meta"


@pytest.mark.parametrize("name", STAGES)
def test_frozen_networks_are_not_in_the_state_dict(name: str) -> None:
    stage = STAGES[name]()
    for part in stage.frozen:
        assert not [key for key in stage.state_dict() if key.startswith(f"{part}.")]
        assert not [key for key, _ in stage.named_parameters() if key.startswith(f"{part}.")]


@pytest.mark.parametrize("name", STAGES)
def test_frozen_networks_are_converted_with_their_stage_and_stay_in_eval_mode(name: str) -> None:
    stage = STAGES[name]().to(torch.float64).train()
    for module in stage.frozen.present().values():
        assert not any(m.training for m in module.modules())
        assert {p.dtype for p in module.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", STAGES)
def test_a_batch_is_one_step(name: str, batch: Batch) -> None:
    stage = STAGES[name]()
    trainer = fit(stage, batch, 5)
    assert trainer.global_step == 5
    assert stage.ema.num_steps == 5


@pytest.mark.parametrize("name", ["b", "c"])
def test_gradients_are_accumulated_before_a_step_and_an_ema_update(name: str, batch: Batch) -> None:
    stage = STAGES[name]()
    num_batches = 0
    training_step = stage.training_step

    def counting_step(*args: Any) -> Any:
        nonlocal num_batches
        num_batches += 1
        return training_step(*args)

    stage.training_step = counting_step  # type: ignore[method-assign]
    trainer = fit(stage, batch, 3, accumulate_grad_batches=2)
    assert trainer.global_step == stage.ema.num_steps == 3
    assert num_batches in (5, 6)  # the last step of an epoch of three batches has one batch


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("a", "c") else pytest.mark.slow) for n in STAGES]
)
def test_the_grid_shows_the_original_and_both_weights(name: str, batch: Batch) -> None:
    stage = STAGES[name]()
    fit(stage, batch, 3)
    with torch.no_grad():
        # make raw and EMA weights differ, and the frozen networks sensitive to their inputs
        frozen = [p for module in stage.frozen.present().values() for p in module.parameters()]
        for parameter in (*stage.parameters(), *frozen):
            parameter.add_(0.3 * torch.randn_like(parameter))
    columns = stage.eval().example_grid(batch)
    raw, ema = ("raw", "EMA") if name == "a" else ("sample", "sample (EMA)")
    assert torch.equal(columns["original"], batch["image"])
    assert (columns[raw] - columns[ema]).abs().max() > 1e-3
    with stage.ema.applied(stage):  # now both columns use the EMA weights
        ema_columns = stage.example_grid(batch)
    torch.testing.assert_close(ema_columns[raw], columns[ema], atol=1e-5, rtol=0)


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    factor = WarmupCosine(warmup_steps=3, total_steps=13, decay="cosine")
    assert [factor(s) for s in (0, 1, 2, 3)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(8) == pytest.approx(0.5)
    assert factor(13) == factor(99) == 0
    assert WarmupCosine(warmup_steps=3)(10**6) == 1


def test_without_steps_to_decay_in_the_learning_rate_drops_after_the_warm_up() -> None:
    factor = WarmupCosine(warmup_steps=3, total_steps=3, decay="cosine")
    assert [factor(s) for s in (2, 3, 4, 5)] == [0.75, 1.0, 0.0, 0.0]
    assert WarmupCosine()(0) == WarmupCosine(total_steps=9, decay="cosine")(0) == 1


def test_cached_captions_are_dropped_like_those_encoded_now() -> None:
    def encode(captions: Sequence[str]) -> Tensor:
        return torch.tensor([[[float(len(caption))]] for caption in captions])

    def without_text(captions: Sequence[str]) -> None:
        return None

    batch: Any = {"caption": ["a", "bb", "ccc"]}
    cached = {**batch, "text": encode(batch["caption"]), "empty_text": encode([""])}
    for dropped in (None, torch.tensor([False, True, False]), torch.ones(3, dtype=torch.bool)):
        keep = 1.0 if dropped is None else (~dropped).float()[:, None, None]
        expected = encode(batch["caption"]) * keep
        assert torch.equal(encode_captions(batch, encode, dropped), expected)
        assert torch.equal(encode_captions(cached, without_text, dropped), expected)
    assert encode_captions(batch, without_text) is None


def test_samples_of_another_process_are_not_counted() -> None:
    batch: Any = {"caption": ["a", "bb", "ccc"]}
    counts = [num_unique_samples({**batch, "is_unique": unique}) for unique in (True, False)]
    assert [num_unique_samples(batch), *counts] == [3, 3, 0]


def test_the_schedule_scales_the_learning_rate_of_every_step(batch: Batch) -> None:
    stage = STAGES["c"](lr_schedule=lambda step: 1 / (step + 1))
    trainer = fit(stage, batch, 3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-3 / 4)
    assert STAGES["c"]().lr_schedule(10**6) == 1


def test_a_stage_without_an_optimizer_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match=r"stage\.optimizer is missing"):
        STAGES["c"](optimizer=None).configure_optimizers()


def test_without_an_ema_validation_uses_the_last_weights(batch: Batch) -> None:
    stage = STAGES["c"](ema=None)
    fit(stage, batch, 3)
    assert all(torch.equal(stage.ema.shadow[key], p) for key, p in stage.named_parameters())


@pytest.mark.parametrize("every", [1, 3])
def test_losses_are_logged_in_the_steps_in_which_logs_are_written(every: int, batch: Batch) -> None:
    stage = STAGES["c"]()
    steps: list[int] = []
    stage.log_dict = lambda values, **_: steps.append(stage.global_step)  # type: ignore[method-assign]
    fit(stage, batch, 6, log_every_n_steps=every)
    assert steps == [step for step in range(6) if (step + 1) % every == 0]


def test_numbers_depend_on_the_micro_batch_within_a_step_and_not_within_an_epoch(
    batch: Batch,
) -> None:
    stage = STAGES["c"]()
    fit(stage, batch, 1, accumulate_grad_batches=3)
    first, second, *later = (stage.batch_rng(2, i).uniform() for i in (0, 1, 3, 4, 9, 10))
    assert not torch.equal(first, second)
    for one, other in (later[:2], later[2:]):
        assert torch.equal(one, first)
        assert torch.equal(other, second)


def test_dropout_is_seeded_by_seed_step_and_micro_batch(batch: Batch) -> None:
    def dropout_seeds(seed: int) -> list[int]:
        stage = STAGES["c"](seed=seed)
        seeds: list[int] = []
        training_step = stage.training_step

        def recording_step(*args: Any) -> Any:
            seeds.append(torch.initial_seed())
            return training_step(*args)

        stage.training_step = recording_step  # type: ignore[method-assign]
        fit(stage, batch, 2, accumulate_grad_batches=2, max_epochs=2)
        return seeds

    first = dropout_seeds(0)
    assert dropout_seeds(0) == first
    assert len({*first, *dropout_seeds(1)}) == 2 * len(first) >= 4


def test_clipping_bounds_the_gradient(batch: Batch) -> None:
    stage = STAGES["c"]()
    norms = []
    clipped_norms = []
    optimizer_step = stage.optimizer_step

    def recording_log(name: str, value: Any, **_: Any) -> None:
        if "norm" in name:
            norms.append(float(value))

    def measured_step(*args: object, **kwargs: object) -> None:
        optimizer_step(*args, **kwargs)
        grads = [p.grad.norm() for p in stage.parameters() if p.grad is not None]
        clipped_norms.append(float(torch.stack(grads).norm()))

    stage.log = recording_log  # type: ignore[method-assign]
    stage.optimizer_step = measured_step  # type: ignore[method-assign]
    fit(stage, batch, 2, gradient_clip_val=0.01)
    assert min(norms) > 0.01
    assert max(clipped_norms) <= 0.0101


@pytest.mark.parametrize("name", "abc")
def test_activation_checkpointing_does_not_change_training(name: str, batch: Batch) -> None:
    plain, checkpointed = STAGES[name](), STAGES[name]()
    assert find_blocks(checkpointed)
    checkpoint_activations(checkpointed)
    fit(plain, batch, 3)
    fit(checkpointed, batch, 3)
    pairs = zip(plain.parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
