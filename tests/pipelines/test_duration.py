"""The estimate of a sampling run's duration."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.pipelines import duration
from wuerstchen_pl.sampling.config import SamplingConfig

FIXED, PRIOR, DECODER = 3.0, 0.5, 0.25
"""Seconds per image, and per step, of an image of 32 x 32 px."""


@dataclass
class Model:
    """A model that takes a known time, and five times that when it is used first."""

    now: float = 0.0
    size_multiple: int = 16

    def generate(
        self, prompts: list[str], height: int, width: int, *, config: SamplingConfig, **_: Any
    ) -> Tensor:
        steps = PRIOR * (len(config.prior.times) - 1) + DECODER * (len(config.decoder.times) - 1)
        seconds = len(prompts) * (FIXED + steps) * height * width / 32**2
        self.now += seconds if self.now else 5 * seconds
        return torch.zeros(1)


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(prior_steps=60, decoder_steps=12),
        SamplingConfig(prior_steps=1, decoder_steps=1),
        SamplingConfig(prior_timesteps=[1.0, 0.5, 0.2, 0.0], decoder_steps=7),
    ],
)
def test_the_estimate_is_exact_for_times_linear_in_steps_and_pixels(
    config: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = Model()
    monkeypatch.setattr(duration, "perf_counter", lambda: model.now)
    estimate = duration.estimate_seconds(model, 6, 64, 96, config)
    start = model.now
    for _ in range(6):
        model.generate([""], 64, 96, config=config)
    assert estimate == pytest.approx(model.now - start)
