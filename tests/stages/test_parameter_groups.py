"""The trained text encoder has a learning rate of its own, and one norm clips all gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import STAGES, fit, stage_a
from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.learning_rate import LearningRate
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.stages.stage import Stage

CLIPPED = {"gradient_clip_val": 0.01}
PRIORS = ("c", "ldm")


def trained(stage: Stage, batch: Batch, **options: Any) -> dict[str, Tensor]:
    fit(stage, batch, 3, **{**CLIPPED, **options})
    return {name: p.detach() for name, p in stage.named_parameters()}


def changed(name: str, batch: Batch, **options: Any) -> dict[str, bool]:
    """Parameter -> whether training changes it."""
    before = {n: p.detach().clone() for n, p in STAGES[name](**options).named_parameters()}
    after = trained(STAGES[name](**options), batch)
    return {n: float((before[n] - p).abs().max()) > 1e-6 for n, p in after.items()}


@pytest.mark.parametrize("name", PRIORS)
def test_two_groups_with_one_learning_rate_train_like_one_group(name: str, batch: Batch) -> None:
    """Bit for bit: both groups are clipped by the norm of all gradients."""
    one_group = STAGES[name]()
    one_group.parameter_groups = lambda: Stage.parameter_groups(one_group)  # type: ignore[method-assign]
    assert len(one_group.parameter_groups()) == 1
    expected = trained(one_group, batch)
    for options in ({}, {"text_encoder_lr": 3e-3}):
        stage = STAGES[name](**options)
        assert len(stage.parameter_groups()) == 2
        actual = trained(stage, batch)
        assert [n for n, p in expected.items() if not torch.equal(p, actual[n])] == []


@pytest.mark.parametrize("name", PRIORS)
def test_the_learning_rate_of_the_text_encoder_is_its_own(name: str, batch: Batch) -> None:
    both, prior_only = (changed(name, batch, **o) for o in ({}, {"text_encoder_lr": 1e-30}))
    encoder = {n for n in both if n.startswith("text_encoder.")}
    assert any(both[n] for n in encoder)
    assert not any(prior_only[n] for n in encoder)
    assert all(prior_only[n] == both[n] for n in both.keys() - encoder)


def test_the_schedule_scales_both_rates_and_both_are_logged(batch: Batch) -> None:
    stage, logged = STAGES["c"](text_encoder_lr=1e-4, lr_schedule=lambda n: 1 / (n + 1)), []
    stage.log = lambda name, value, **_: logged.append((name, value))  # type: ignore[method-assign]
    trained(stage, batch, callbacks=[LearningRate()], log_every_n_steps=1)
    rates = {key: [v for n, v in logged if n == key] for key, _ in logged if "lr" in key}
    assert rates == {
        "train/lr": pytest.approx([3e-3, 1.5e-3, 1e-3]),
        "train/lr_text_encoder": pytest.approx([1e-4, 5e-5, 1e-4 / 3]),
    }


def of_base(network: Any) -> Any:
    network.source = {"path": "base", "sha256": "0"}
    for parameter in network.parameters():  # some are 0 when they are initialized
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return network


@pytest.mark.filterwarnings("ignore:.*in eval mode")
@pytest.mark.parametrize("alone", [False, True])
def test_the_adapter_of_the_text_encoder_has_its_own_learning_rate(
    alone: bool, batch: Batch
) -> None:
    torch.manual_seed(0)
    prior = of_base(Prior(width=32, depth=2, num_heads=2, text_dim=16, dropout=0.1))
    text = of_base(TextEncoder(width=16, depth=1, num_heads=2, context_length=8))
    stage = STAGES["c"](
        prior=prior, text_encoder=text, train_text_encoder=False, text_encoder_lr=1e-4,
        text_adapter=Adapter(rank=2, targets=["*.attn.*"]),
        adapter=None if alone else Adapter(rank=2), lr_schedule=lambda n: 1.0,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in stage.named_parameters()}
    fit(stage, batch, 1)
    updates = {
        name: float((parameter.detach() - before[name]).abs().max())
        for name, parameter in stage.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    trained = {name for name in before if "lora_B" in name}  # A has gradients once B is not 0
    assert updates.keys() == trained
    assert any(name.startswith("prior.") for name in trained) is not alone
    for name, update in updates.items():  # of Adam's first step
        assert update == pytest.approx(3e-3 if name.startswith("prior.") else 1e-4, rel=1e-3)


def test_a_group_with_a_loss_of_its_own_is_clipped_by_its_own_norm(batch: Batch) -> None:
    """With SGD, the update is the clipped gradient."""

    def sgd(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1.0)

    before = {n: p.detach().clone() for n, p in stage_a().named_parameters()}
    stage = stage_a(optimizer=sgd, adversarial_start_step=0)
    fit(stage, batch, 1, gradient_clip_val=1e-3)
    for network in ("vqgan", "discriminator"):
        updates = [p.detach() - before[n] for n, p in stage.named_parameters() if network in n]
        norm = torch.cat([update.flatten() for update in updates]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_encoder_lr": 0.0}, r"text_encoder_lr=0\.0 is out of range"),
        (
            {"text_encoder_lr": 1e-5, "train_text_encoder": False},
            "has no effect on a frozen text encoder; set train_text_encoder=true, text_adapter or",
        ),
        (
            {"text_adapter": Adapter(targets=["*.attn.*"])},
            "set train_text_encoder=false or text_adapter=null",
        ),
    ],
)
def test_a_rate_that_cannot_be_used_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        STAGES["c"](**options)
