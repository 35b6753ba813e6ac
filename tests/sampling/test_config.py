"""Settings of a sampling run: ranges, stages and defaults."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from wuerstchen_pl.sampling.config import SamplingConfig


@pytest.mark.parametrize(
    ("key", "lowest", "highest", "outside"),
    [
        ("prior_steps", 1, 10_000, [0, 10_001, 2.0, None]),
        ("decoder_steps", 1, 10_000, [0, 10_001, 2.0]),
        ("batch_size", 1, 10_000, [0, 10_001, 2.0]),
        ("prior_guidance_scale", 0.0, 100.0, [-0.1, 100.1, float("nan")]),
        ("decoder_guidance_scale", 0.0, 100.0, [-0.1, 100.1, float("nan")]),
        ("guidance_rescale", 0.0, 1.0, [-0.1, 1.1]),
    ],
)
def test_settings_are_accepted_in_their_range_only(
    key: str, lowest: float, highest: float, outside: Sequence[Any]
) -> None:
    for value in (lowest, highest):
        assert getattr(SamplingConfig(**{key: value}), key) == value  # type: ignore[arg-type]
    for value in outside:
        with pytest.raises(ValueError, match=f"{key}={value} is out of range"):
            SamplingConfig(**{key: value})


def test_each_stage_has_its_own_settings() -> None:
    config = SamplingConfig(
        prior_steps=2, prior_guidance_scale=3.0, guidance_rescale=0.25,
        guidance_interval=[0.1, 0.9], decoder_steps=4, decoder_guidance_scale=5.0,
        prior_sampler="ddim", decoder_sampler="dpmpp_2m",
    )  # fmt: skip
    prior, decoder = config.prior, config.decoder
    assert prior.times == [1.0, 0.5, 0.0]
    assert decoder.times == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert (prior.guidance.scale, decoder.guidance.scale) == (3.0, 5.0)
    assert (prior.guidance.rescale, decoder.guidance.rescale) == (0.25, 0.0)
    assert (prior.guidance.interval, decoder.guidance.interval) == ((0.1, 0.9), (0.0, 1.0))
    assert (prior.method, decoder.method) == ("ddim", "dpmpp_2m")
    assert not SamplingConfig().decoder.guidance.on
    assert all(SamplingConfig().prior.guidance.at(t) for t in (0.0, 0.5, 1.0))
    listed = SamplingConfig(prior_timesteps=[0.9, 0.3, 0.0])
    assert listed.prior.times == [0.9, 0.3, 0.0]
    assert listed.decoder.times == SamplingConfig().decoder.times


def test_the_defaults_are_those_of_the_configuration() -> None:
    path = Path(__file__).parents[2] / "conf/sample/default.yaml"
    configured = yaml.safe_load(path.read_text(encoding="utf-8"))
    configured.pop("_target_", None)
    for name, value in configured.items():
        default = getattr(SamplingConfig(), name)
        assert (list(default) if isinstance(default, tuple) else default) == value, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior_sampler": "euler"}, "sampler='euler' is unknown"),
        ({"prior_timesteps": [0.1, 0.5]}, "are not decreasing"),
        ({"guidance_interval": [0.5, 0.5]}, "is empty"),
    ],
)
def test_wrong_settings_are_rejected_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)
