"""The noise error and its p2 weight against their closed forms."""

import pytest
import torch

from wuerstchen_pl.diffusion.objective import noise_error, p2_weight
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
