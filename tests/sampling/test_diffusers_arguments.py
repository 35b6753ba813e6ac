"""diffusers' keyword arguments and callbacks reach the denoising loop."""

from typing import Any

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.sampling.diffusers_arguments import denoise_params, with_legacy_callback


def params(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "num_inference_steps": 2, "timesteps": None, "guidance_scale": 4.0,
        "guidance_rescale": 0.5, "guidance_interval": (0.2, 0.7), "sampler": "ddim",
        "generator": None, "callback_on_step_end": None,
        "callback_on_step_end_tensor_inputs": None, "callback": None, "callback_steps": 1,
        "progress_label": None,
    }  # fmt: skip
    return denoise_params(**options | changes)


def test_keyword_arguments_reach_the_loop() -> None:
    rng = torch.Generator()
    plain = params(generator=rng, progress_label="Stage C")
    assert plain.config.times == [1.0, 0.5, 0.0]
    assert params(timesteps=[0.8, 0.0]).config.times == [0.8, 0.0]
    guidance = plain.config.guidance
    assert (guidance.scale, guidance.rescale, guidance.interval) == (4.0, 0.5, (0.2, 0.7))
    assert (plain.config.method, plain.progress_label) == ("ddim", "Stage C")
    assert plain.generator is rng
    assert plain.callback is None


def test_a_callback_gets_the_tensors_it_asks_for_and_the_deprecated_one_the_latents() -> None:
    def deprecated(step: int, t: Tensor, latents: Tensor) -> None:
        pass

    asked = {"callback_on_step_end_tensor_inputs": ["noise"]}
    assert list(params().callback_inputs) == []
    assert list(params(**asked).callback_inputs) == ["noise"]
    assert list(params(callback=deprecated).callback_inputs) == ["latents"]
    assert sorted(params(**asked, callback=deprecated).callback_inputs) == ["latents", "noise"]
    both = {"callback_on_step_end_tensor_inputs": ["latents"], "callback": deprecated}
    assert list(params(**both).callback_inputs) == ["latents"]


def test_the_deprecated_callback_sees_what_the_other_one_changed() -> None:
    before, after, t = torch.zeros(1), torch.ones(1), torch.tensor(0.5)
    seen: list[tuple[int, Tensor, Tensor]] = []

    def change(sampler: Any, step: int, t: Tensor, tensors: dict) -> dict | None:
        assert (sampler, float(t), tensors["latents"]) == ("sampler", 0.5, before)
        return {"latents": after} if step == 3 else None

    both = with_legacy_callback(change, lambda *call: seen.append(call), 3)
    assert both is not None
    results = [both("sampler", step, t, {"latents": before}) for step in range(5)]
    assert [r and r["latents"] is after for r in results] == [None, None, None, True, None]
    assert [(step, time is t, x is after) for step, time, x in seen] == [
        (0, True, False),
        (3, True, True),
    ]
    alone = with_legacy_callback(None, lambda *call: seen.append(call), 1)
    assert alone is not None
    assert alone("sampler", 1, t, {"latents": before}) is None
    assert seen[-1][2] is before
    assert with_legacy_callback(change, None, 1) is change
    with pytest.raises(ValueError, match="callback_steps=0 is out of range"):
        with_legacy_callback(change, lambda *call: None, 0)
