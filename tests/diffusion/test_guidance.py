"""Classifier-free guidance against its closed form."""

import pytest
import torch

from wuerstchen_pl.diffusion.guidance import Guidance


def test_guidance_extrapolates_from_the_unconditional_to_the_conditional_prediction() -> None:
    conditional, unconditional = torch.full((1, 2), 2.0), torch.full((1, 2), -1.0)
    guided = Guidance(scale=3.0).combine(conditional, unconditional)
    assert torch.equal(guided, torch.full((1, 2), 8.0))  # -1 + 3 * 3


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.0])
def test_guidance_scales_up_to_one_turn_it_off(scale: float) -> None:
    assert not Guidance(scale=scale).on
    assert Guidance(scale=1.001).on


def test_guidance_is_off_by_default_and_else_plain_at_all_times() -> None:
    assert not Guidance().on
    assert Guidance(scale=2.0) == Guidance(scale=2.0, rescale=0.0, interval=(0.0, 1.0))
    assert all(Guidance(scale=2.0).at(t) for t in (0.0, 1.0))


def test_guidance_is_limited_to_its_interval() -> None:
    guidance = Guidance(scale=4.0, interval=(0.2, 0.8))
    assert [guidance.at(t) for t in (0.1, 0.2, 0.5, 0.8, 0.9)] == [False, True, True, True, False]
    assert not Guidance(scale=1.0, interval=(0.2, 0.8)).at(0.5)


def test_rescaled_guidance_has_the_conditional_predictions_standard_deviation() -> None:
    conditional, unconditional = torch.randn(
        2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)
    )
    axes = (1, 2, 3)
    plain = Guidance(scale=7.0).combine(conditional, unconditional)
    full = Guidance(scale=7.0, rescale=1.0).combine(conditional, unconditional)
    half = Guidance(scale=7.0, rescale=0.5).combine(conditional, unconditional)
    torch.testing.assert_close(full.std(axes), conditional.std(axes))
    torch.testing.assert_close(half, (plain + full) / 2)
    assert (plain.std(axes) > 3 * conditional.std(axes)).all()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"scale": float("nan")}, "guidance_scale=nan is not finite"),
        ({"interval": (0.5,)}, "is not an interval"),
        ({"interval": (0.1, 0.5, 0.9)}, "is not an interval"),
        ({"rescale": 1.001}, "guidance_rescale=1.001 is out of range"),
        ({"rescale": -0.001}, "guidance_rescale=-0.001 is out of range"),
        ({"interval": (0.5, 0.5)}, "is empty"),
        ({"interval": (0.7, 0.3)}, "is empty"),
        ({"interval": (0.5, 1.001)}, "is empty"),
        ({"interval": (-0.001, 0.5)}, "is empty"),
    ],
)
def test_guidance_out_of_range_is_rejected(argument: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**argument)


def test_guidance_is_plain_by_default() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(scale=2.0)
    assert all(guidance.at(t) for t in (0.0, 0.5, 1.0))
    expected = 2 * conditional - unconditional
    torch.testing.assert_close(guidance.combine(conditional, unconditional), expected)
    assert not Guidance().on
    assert Guidance(scale=1.001, rescale=1.0).on
