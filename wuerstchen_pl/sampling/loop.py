"""The denoising loop of Stages B and C: cached conditioning, guidance, callbacks, progress bar."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl.diffusion.sampler import Denoiser, Generator, sample
from wuerstchen_pl.diffusion.schedule import CosineSchedule
from wuerstchen_pl.models.conditioning import BlockInputs, CachedConditioning
from wuerstchen_pl.sampling.config import DenoiseConfig

Tensors = dict[str, Tensor]
StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor | None]], Tensors | None]
"""(sampler, step, time, tensors by name) -> the changed ones. Absent tensors are None."""
LegacyCallback = Callable[[int, Tensor, Tensor], None]
"""diffusers' deprecated form: (step, time, latents), which cannot change anything."""
Conditioning = Sequence[BlockInputs | CachedConditioning]
PredictNoise = Callable[[Tensor, Conditioning], Tensor]
TEXT, NEGATIVE = "text_encoder_hidden_states", "negative_prompt_embeds"


@dataclass(frozen=True, kw_only=True)
class DenoiseParams:
    """Parameters of one run of the denoising loop."""

    config: DenoiseConfig
    generator: Generator
    callback: StepCallback | None = None
    callback_inputs: Sequence[str] = ("latents",)
    progress_label: str | None = None
    """Label of the progress bar; None shows none."""

    def check(self, tensor_names: Sequence[str]) -> None:
        """Reject inputs of the callback that would otherwise fail only after some steps.

        Args:
            tensor_names: the tensors that a callback may ask for.

        Raises:
            ValueError: if one of the inputs is unknown.
        """
        for name in self.callback_inputs:
            if name not in tensor_names:
                raise ValueError(
                    f"callback_on_step_end_tensor_inputs={name!r} is unknown; choose from "
                    f"{', '.join(tensor_names)}"
                )


class StepState:
    """State that a callback may read and change while a sampler runs, named as in diffusers.

    Set ``_guidance_scale`` to change the guidance from the next step on (1 or less turns it off;
    it cannot be turned on in a run that started without), and ``_interrupt`` to stop after the
    current step.
    """

    part: ClassVar[str] = "network"
    """What error messages call the network."""
    _guidance_scale: float = 0.0
    _num_timesteps: int = 0
    _interrupt: bool = False

    def begin(self, params: DenoiseParams) -> None:
        """Reset the state for a new run."""
        self._guidance_scale = params.config.guidance.scale
        self._num_timesteps = len(params.config.times) - 1
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the next step."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step is guided."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run stops after this step."""
        return self._interrupt


class Solver(Protocol):
    """Follows the times of a run with a denoiser; see ``diffusion.sampler.sample``."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        /,
        *,
        on_step: Callable[[int, Tensor], Tensor],
        interrupted: Callable[[], bool],
    ) -> Tensor:
        """X at the first time -> at the last."""


def continuous_solver(params: DenoiseParams, schedule: CosineSchedule) -> Solver:
    """DDPM or DDIM steps in continuous latents."""
    config = params.config
    return partial(
        sample,
        times=config.times,
        generator=params.generator,
        schedule=schedule,
        method=config.method,
    )


def denoise(
    predict_noise: PredictNoise,
    cache_conditioning: Callable[[Mapping[str, Tensor]], Conditioning],
    latents: Tensor,
    tensors: Tensors,
    params: DenoiseParams,
    *,
    sampler: StepState,
    solver: Solver,
    latents_hook: Callable[[Tensor, float], Tensor] = lambda x, t: x,
) -> Tensor:
    """Denoise latents along ``params.config.times``.

    Args:
        predict_noise: latents and conditioning -> noise; see ``Prior.predict_noise``.
        cache_conditioning: conditioning tensors -> the blocks' conditioning, for 2B rows
            (conditional, unconditional) if ``params.config.guidance`` is on, else for B.
        latents: (B, C, h, w) at the first time.
        tensors: conditioning tensors by name, which a callback may read and replace.
        params: times, guidance, generator, callback.
        sampler: the sampler that is passed to the callback.
        solver: takes the steps.
        latents_hook: latents and their time -> latents for the next step.

    Returns:
        (B, C, h, w) at the last time, or after the step at which it was interrupted.

    Raises:
        ValueError: if they are not finite, such as after an overflow in float16.
    """
    rows, times, guidance = len(latents), params.config.times, params.config.guidance
    conditioning = cache_conditioning(tensors)
    sampler.begin(params)

    def predict(xt: Tensor, i: int) -> Tensor:
        nonlocal guidance
        if guidance.scale != sampler.guidance_scale:  # a callback changed it
            guidance = replace(guidance, scale=sampler.guidance_scale)
        if not (params.config.guidance.on and guidance.at(times[i])):
            return predict_noise(xt, [c.at_step(i).first_rows(rows) for c in conditioning])
        preds = predict_noise(xt, [c.at_step(i) for c in conditioning])
        if len(preds) == rows:  # no block reads the conditioning: both predictions are the same
            return preds
        return guidance.combine(*preds.chunk(2))

    def after_step(i: int, x: Tensor) -> Tensor:
        nonlocal conditioning
        bar.update()
        x = latents_hook(x, times[i + 1])
        if params.callback is None:
            return x
        inputs = {name: {"latents": x, **tensors}.get(name) for name in params.callback_inputs}
        changed = params.callback(sampler, i, torch.tensor(times[i]), inputs) or {}
        if _replace_tensors(tensors, changed):
            conditioning = cache_conditioning(tensors)
        return changed.get("latents", x)

    label = params.progress_label
    with tqdm(total=len(times) - 1, desc=label, disable=label is None) as bar:
        result = solver(predict, latents, on_step=after_step, interrupted=lambda: sampler.interrupt)
    if not bool(result.isfinite().all()):
        raise ValueError(
            f"the {sampler.part} computed latents that are not finite in {latents.dtype}; use "
            "float32, or other weights"
        )
    return result


def _replace_tensors(tensors: Tensors, changed: Mapping[str, Tensor]) -> bool:
    """Replace the conditioning tensors that a callback changed; return whether there were any."""
    updates = {k: v for k, v in changed.items() if k in tensors and v is not tensors[k]}
    tensors.update(updates)
    if NEGATIVE in updates:  # the second half of the text embeddings, conditional and unconditional
        prompt = tensors[TEXT][: -len(updates[NEGATIVE])]
        tensors[TEXT] = torch.cat([prompt, updates[NEGATIVE].to(prompt)])
    return bool(updates)
