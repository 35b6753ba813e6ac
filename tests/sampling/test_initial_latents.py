"""Initial latents: times from a strength, repeated rows and noise."""

import pytest
import torch

from wuerstchen_pl.diffusion.sampler import generators_from_seeds, randn
from wuerstchen_pl.sampling.initial_latents import expand_rows, initial_noise, times_from

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("strength", "times", "expected"),
    [
        (0.6, [1.0, 0.75, 0.5, 0.25, 0.0], [0.6, 0.5, 0.25, 0.0]),
        (0.5, [1.0, 0.75, 0.5, 0.25, 0.0], [0.5, 0.25, 0.0]),  # a time is not repeated
        (1.0, [1.0, 0.5, 0.0], [1.0, 0.5, 0.0]),
        (1.0, [0.8, 0.4, 0.0], [0.8, 0.4, 0.0]),  # nothing is above the first time
        (0.8, [0.8, 0.4, 0.0], [0.8, 0.4, 0.0]),
        (0.0, [1.0, 0.5, 0.0], [0.0]),
        (0.0, [1.0, 0.5, 0.1], [0.0]),
        (0.2, [1.0, 0.5, 0.1], [0.2, 0.1]),
    ],
)
def test_times_start_at_the_strength(
    strength: float, times: list[float], expected: list[float]
) -> None:
    assert list(times_from(strength, times)) == expected


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (-0.01, "strength=-0.01 is out of range"),
        (1.01, "strength=1.01 is out of range"),
        (0.1, "strength=0.1 is too low; use 0, or more than 0.1"),
        (0.05, "strength=0.05 is too low"),
    ],
)
def test_a_strength_without_a_step_is_rejected(strength: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        times_from(strength, [1.0, 0.5, 0.1])


def test_rows_are_repeated_next_to_each_other() -> None:
    x = torch.tensor([[1.0], [2.0]])
    assert expand_rows(x, (4, 1), "x").flatten().tolist() == [1, 1, 2, 2]
    assert expand_rows(x, (2, 1), "x").flatten().tolist() == [1, 2]
    assert expand_rows(x[:1], (3, 1), "x").flatten().tolist() == [1, 1, 1]
    for shape in ((3, 1), (1, 1), (2, 2)):
        with pytest.raises(ValueError, match=r"x have shape \(2, 1\); use shape .*, or one row"):
            expand_rows(x, shape, "x")
    with pytest.raises(ValueError, match=r"x have shape \(0, 1\)"):
        expand_rows(x[:0], (2, 1), "x")


def test_initial_noise_is_that_of_the_generator_unless_latents_are_given() -> None:
    expected = randn((2, 3), generators_from_seeds([4, 5]), CPU)
    assert torch.equal(initial_noise((2, 3), None, generators_from_seeds([4, 5]), CPU), expected)
    converted = initial_noise((2, 3), expected.double(), None, CPU)
    assert converted.dtype == torch.float32
    assert torch.equal(converted, expected)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); use shape \(1, 3\)"):
        initial_noise((1, 3), expected, None, CPU)
