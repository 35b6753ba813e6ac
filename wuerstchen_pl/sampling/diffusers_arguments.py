"""Turns diffusers' keyword arguments of a pipeline into parameters of the denoising loop."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.sampler import Generator, SamplerName, resolve_timesteps
from wuerstchen_pl.sampling.config import DenoiseConfig
from wuerstchen_pl.sampling.loop import DenoiseParams, LegacyCallback, StepCallback


def denoise_params(
    *,
    num_inference_steps: int,
    timesteps: Sequence[float] | None,
    guidance_scale: float,
    guidance_rescale: float,
    guidance_interval: tuple[float, float],
    temperature: tuple[float, float] | None = None,
    sampler: SamplerName,
    generator: Generator,
    callback_on_step_end: StepCallback | None,
    callback_on_step_end_tensor_inputs: Sequence[str] | None,
    callback: LegacyCallback | None,
    callback_steps: int,
    progress_label: str | None,
) -> DenoiseParams:
    """Parameters of one stage's loop; the arguments are those of ``PriorSampler.__call__``.

    Raises:
        ValueError: if an argument is out of its range.
    """
    inputs = ("latents",) if callback is not None else ()
    return DenoiseParams(
        config=DenoiseConfig(
            times=resolve_timesteps(num_inference_steps, timesteps),
            guidance=Guidance(
                scale=guidance_scale, rescale=guidance_rescale, interval=guidance_interval
            ),
            method=sampler,
            temperature=temperature,
        ),
        generator=generator,
        callback=with_legacy_callback(callback_on_step_end, callback, callback_steps),
        callback_inputs=[*{*(callback_on_step_end_tensor_inputs or ()), *inputs}],
        progress_label=progress_label,
    )


def with_legacy_callback(
    callback_on_step_end: StepCallback | None, legacy: LegacyCallback | None, every_steps: int
) -> StepCallback | None:
    """Combine both kinds of callback.

    Raises:
        ValueError: if ``every_steps`` is below 1.
    """
    if legacy is None:
        return callback_on_step_end
    if every_steps < 1:
        raise ValueError(f"callback_steps={every_steps} is out of range; use 1 or more")

    def both(sampler: Any, step: int, t: Tensor, tensors: dict[str, Tensor | None]) -> Any:
        changed = callback_on_step_end(sampler, step, t, tensors) if callback_on_step_end else None
        if step % every_steps == 0:
            latents = (changed or {}).get("latents", tensors["latents"])
            assert latents is not None
            legacy(step, t, latents)
        return changed

    return both
