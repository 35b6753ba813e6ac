"""The noise error and its p2 weight against their closed forms."""

import pytest
import torch

from wuerstchen_pl.diffusion.objective import noise_error, p2_weight, weighted_mean
from wuerstchen_pl.diffusion.schedule import CosineSchedule

SCHEDULE = CosineSchedule()


@pytest.mark.parametrize(
    ("form", "weight"),
    [("code", lambda a: 1 - a), ("paper", lambda a: (1 - a) / (1 + a)), ("none", lambda a: 1.0)],
)
def test_p2_weight_has_its_closed_form(form: str, weight: object) -> None:
    t = torch.tensor([0.1, 0.4, 0.9])
    expected = torch.tensor(
        [weight(a) for a in SCHEDULE.alpha_bar(t).tolist()]  # type: ignore[operator]
    )
    torch.testing.assert_close(p2_weight(SCHEDULE, t, form), expected)  # type: ignore[arg-type]
    alpha_bar = SCHEDULE.alpha_bar(t)
    snr = alpha_bar / (1 - alpha_bar)
    if form == "code":  # k = gamma = 1 of Choi et al.
        torch.testing.assert_close(p2_weight(SCHEDULE, t, "code"), 1 / (1 + snr))


def test_an_unknown_form_of_the_weight_is_rejected() -> None:
    with pytest.raises(ValueError, match="'paper', 'code' or 'none'"):
        p2_weight(SCHEDULE, torch.tensor([0.5]), "p3")  # type: ignore[arg-type]


def test_noise_error_is_the_mean_of_each_sample() -> None:
    pred = torch.tensor([[[1.0, 3.0], [5.0, 7.0]], [[0.0, 0.0], [0.0, 2.0]]])
    expected = torch.tensor([21.0, 1.0])
    torch.testing.assert_close(noise_error(pred, torch.zeros(2, 2, 2)), expected)


def test_noise_error_is_computed_in_float32() -> None:
    pred, noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = noise_error(pred.float(), noise.float())
    for a, b in ((pred, noise), (pred.float(), noise), (pred, noise.float())):
        assert torch.equal(noise_error(a, b), expected)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(24, 24), (7, 5), (32, 16)])
def test_a_mask_of_ones_changes_no_bit(size: tuple[int, int]) -> None:
    pred, noise = random(3, 16, *size), random(3, 16, *size, seed=1)
    mask = torch.ones(3, 1, 320, 224)
    assert torch.equal(noise_error(pred, noise, mask), noise_error(pred, noise))


def test_a_mask_gives_the_weighted_mean_over_positions() -> None:
    """Positions of 2 x 2 pixels, whose weights are the means of their pixels."""
    errors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mask = torch.tensor(
        [[1.0, 1.0, 0.5, 0.0], [1.0, 1.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    )
    # weights 1, 1/4, 0, 1/4
    expected = torch.tensor([(1 * 1 + 2 / 4 + 4 / 4) / 1.5])
    pred = errors.sqrt().expand(1, 3, 2, 2)
    result = noise_error(pred, torch.zeros(1, 3, 2, 2), mask[None, None])
    torch.testing.assert_close(result, expected)
    half = noise_error(pred, torch.zeros(1, 3, 2, 2), mask[None, None] / 2)
    torch.testing.assert_close(half, expected)


def test_nothing_outside_the_mask_has_an_effect_or_a_gradient() -> None:
    pred, noise = random(2, 4, 6, 6).requires_grad_(), random(2, 4, 6, 6, seed=1)
    mask = torch.zeros(2, 1, 48, 48)
    mask[..., :24, :] = 1
    loss = noise_error(pred, noise, mask)
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    assert gradient[..., 3:, :].abs().max() == 0
    assert gradient[..., :3, :].abs().min() > 0
    changed = pred.detach().clone()
    changed[..., 3:, :] = 100
    assert torch.equal(noise_error(changed, noise, mask), loss)
    torch.testing.assert_close(loss, noise_error(pred[..., :3, :], noise[..., :3, :]))


def test_an_empty_mask_gives_a_loss_and_gradients_of_zero() -> None:
    pred, mask = random(2, 4, 6, 6).requires_grad_(), torch.zeros(2, 1, 48, 48)
    mask[1] = 1 / 255
    mask[1, :, 1:] = 0
    loss = noise_error(pred, torch.zeros(2, 4, 6, 6), mask)
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    assert loss[0] == 0
    assert gradient[0].abs().max() == 0
    torch.testing.assert_close(loss[1], pred[1, :, 0].square().mean())


def test_the_smallest_mask_is_not_taken_for_an_empty_one() -> None:
    """One pixel at the lowest level, in a position of 43 x 43 pixels."""
    pred, mask = random(1, 16, 24, 24), torch.zeros(1, 1, 1024, 1024)
    mask[0, 0, 500, 500] = 1 / 255
    loss = noise_error(pred, torch.zeros_like(pred), mask)
    errors = pred.square().mean(dim=1).flatten()
    assert (errors - loss).abs().min() < 1e-5  # the error of that position


def test_a_weighted_mean_of_two_processes_is_that_of_one() -> None:
    losses, weights = random(8).square(), torch.tensor([1.0, 2, 0, 1, 3, 1, 0.5, 1])
    halves = [weighted_mean(losses[rows], weights[rows]) for rows in (slice(4), slice(4, 8))]
    whole = weighted_mean(losses, weights)
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    torch.testing.assert_close(whole, (losses * weights).sum() / 8)
    assert torch.equal(weighted_mean(losses, torch.ones(8)), weighted_mean(losses, None))
