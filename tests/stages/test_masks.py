"""Masks and weights of images in the losses of the stages."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.stages.conftest import STAGES, fit
from wuerstchen_pl.stages.data_checks import check_mask
from wuerstchen_pl.stages.stage import Batch, Stage

WITH_MASKS = ["b", "c", "ldm"]


def weights_after(name: str, batch: Batch) -> dict[str, torch.Tensor]:
    stage = STAGES[name]()
    fit(stage, batch, 2)
    return stage.state_dict()


def trained_loss(stage: Stage, batch: Batch) -> torch.Tensor:
    """The loss of the first training step, with a head that is not zero."""
    losses: list[torch.Tensor] = []
    step = stage.training_step

    def recording_step(*arguments: Any) -> torch.Tensor:
        losses.append(step(*arguments))
        return losses[-1]

    stage.training_step = recording_step  # type: ignore[method-assign]
    fit(stage, batch, 1)
    return losses[0].detach()


@pytest.mark.parametrize("name", WITH_MASKS)
def test_masks_and_weights_of_one_change_no_bit_of_the_training(name: str, batch: Batch) -> None:
    plain = weights_after(name, batch)
    ones = weights_after(name, {**batch, "mask": torch.ones(4, 1, 32, 32), "weight": torch.ones(4)})
    assert all(torch.equal(plain[key], ones[key]) for key in plain)


@pytest.mark.parametrize("name", WITH_MASKS)
def test_masks_apply_in_training_and_validation(name: str, batch: Batch) -> None:
    mask = torch.ones(4, 1, 32, 32)
    mask[0], mask[1, :, :16] = 0, 0
    masked: Batch = {**batch, "mask": mask}
    plain_losses, losses = (
        STAGES[name]().eval().validation_losses(b)[1]  # type: ignore[operator]
        for b in (batch, masked)
    )
    assert losses[0].abs().max() == 0
    assert (losses[1] - plain_losses[1]).abs().min() > 0
    assert torch.equal(losses[2:], plain_losses[2:])
    assert trained_loss(STAGES[name](), masked) < trained_loss(STAGES[name](), batch)


@pytest.mark.parametrize("name", WITH_MASKS)
def test_weights_scale_the_losses_of_training_only(name: str, batch: Batch) -> None:
    only = [
        trained_loss(STAGES[name](), {**batch, "weight": torch.eye(4)[row]}) for row in range(4)
    ]
    assert len(set(only)) == 4
    torch.testing.assert_close(sum(only), trained_loss(STAGES[name](), batch))
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0])
    expected = (torch.stack(only) * weights).sum()
    torch.testing.assert_close(trained_loss(STAGES[name](), {**batch, "weight": weights}), expected)
    stage = STAGES[name]().eval()
    losses = [
        stage.validation_losses(b)[1]  # type: ignore[operator]
        for b in (batch, {**batch, "weight": weights})
    ]
    assert torch.equal(*losses)


def test_masks_are_refused_for_stage_a() -> None:
    data: Any = SimpleNamespace(mask="alpha")
    with pytest.raises(ValueError, match=r"^data\.mask='alpha' has no effect on stage=a, .*null$"):
        check_mask(STAGES["a"](), data)
    check_mask(STAGES["b"](), data)
    check_mask(STAGES["a"](), SimpleNamespace(mask=None))  # type: ignore[arg-type]
