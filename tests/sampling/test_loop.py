"""Callbacks of a running sampler, and guidance of a network without conditioning."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.sampler import generators_from_seeds
from wuerstchen_pl.diffusion.schedule import CosineSchedule
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.vqgan import VQGAN
from wuerstchen_pl.sampling.config import DenoiseConfig
from wuerstchen_pl.sampling.latent_decoder import LatentDecoderSampler
from wuerstchen_pl.sampling.loop import (
    NEGATIVE,
    TEXT,
    DenoiseParams,
    StepState,
    continuous_solver,
    denoise,
)
from wuerstchen_pl.sampling.prior import PriorSampler

SCHEDULE = CosineSchedule()
PROMPTS = ["red apple", "green frog"]
STEPS = 4


def randomize(net: torch.nn.Module) -> None:
    """Replace the zero-initialized heads, with which conditioning has no effect."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)


@pytest.fixture(scope="module")
def sampler() -> PriorSampler:
    torch.manual_seed(0)
    prior = Prior(width=16, depth=1, num_heads=2, text_dim=16, dropout=0.0)
    text = TextEncoder(width=16, depth=1, num_heads=2, context_length=8)
    randomize(prior)
    return PriorSampler(prior=prior.eval(), text_encoder=text.eval(), resolution_multiple=16)


def run(sampler: PriorSampler, guidance_scale: float = 4.0, **options: Any) -> Tensor:
    return sampler(
        PROMPTS, 64, 64, num_inference_steps=STEPS, guidance_scale=guidance_scale,
        generator=generators_from_seeds([0, 1]), progress=False, **options,
    )[0]  # fmt: skip


Callback = Callable[[Any, int, Tensor, dict], dict]


def test_a_callback_replaces_the_negative_prompt(sampler: PriorSampler) -> None:
    """It applies from the second step, like a replacement of both halves of the text embeddings."""
    other = sampler.text_encoder(["a ship", "a ship"])

    def replace(_: Any, step: int, t: Tensor, tensors: dict) -> dict:
        assert len(tensors["negative_prompt_embeds"]) == 2
        return {"negative_prompt_embeds": other}

    names = ["negative_prompt_embeds"]
    changed = run(sampler, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=names)
    assert not torch.allclose(changed, run(sampler))

    def replace_both(_: Any, step: int, t: Tensor, tensors: dict) -> dict:
        text = tensors["text_encoder_hidden_states"]
        return {"text_encoder_hidden_states": torch.cat([text[:2], other])}

    names = ["text_encoder_hidden_states"]
    expected = run(
        sampler, callback_on_step_end=replace_both, callback_on_step_end_tensor_inputs=names
    )
    assert torch.equal(changed, expected)


def test_a_callback_changes_the_guidance_scale(sampler: PriorSampler) -> None:
    seen: list[tuple[float, bool, int]] = []

    def turn_off(state: Any, step: int, t: Tensor, tensors: dict) -> dict:
        seen.append((state.guidance_scale, state.do_classifier_free_guidance, state.num_timesteps))
        state._guidance_scale = 0.0
        return {}

    changed = run(sampler, callback_on_step_end=turn_off)
    assert seen == [(4.0, True, STEPS)] + [(0.0, False, STEPS)] * (STEPS - 1)
    first = run(sampler, guidance_interval=(0.99, 1.0))  # the first time is 1
    assert torch.equal(changed, first)
    assert not torch.allclose(changed, run(sampler))


@pytest.mark.parametrize("after", [0, 2])
def test_a_callback_interrupts_the_run(sampler: PriorSampler, after: int) -> None:
    latents: list[Tensor] = []

    def stop(state: Any, step: int, t: Tensor, tensors: dict) -> dict:
        latents.append(tensors["latents"])
        state._interrupt = step == after
        return {}

    result = run(sampler, callback_on_step_end=stop)
    assert len(latents) == after + 1
    assert torch.equal(result, sampler.scaling.denormalize(latents[-1]))
    assert not torch.equal(result, run(sampler))  # the next run is not interrupted


def test_the_deprecated_callback_is_called_every_few_steps(sampler: PriorSampler) -> None:
    calls: list[tuple[int, float]] = []
    run(sampler, callback=lambda i, t, x: calls.append((i, float(t))), callback_steps=2)
    assert calls == [(0, 1.0), (2, 0.5)]
    with pytest.raises(ValueError, match="callback_steps=0 is out of range; use 1 or more"):
        run(sampler, callback=lambda i, t, x: None, callback_steps=0)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_guidance_has_no_effect_on_a_network_without_conditioning(rows: int) -> None:
    """Without attention and injection, both predictions are the same, for any number of rows."""
    torch.manual_seed(0)
    net = DiffNeXt(
        widths=[16], num_blocks=[1], num_heads=[None], inject_semantic=[False], cond_dim=8,
        dropout=0.0,
    )  # fmt: skip
    randomize(net)
    vqgan = VQGAN(width=16, bottleneck_blocks=1, codebook_size=16)
    sampler = LatentDecoderSampler(decoder=net.eval(), vqgan=vqgan.eval(), latent_dim_scale=4)
    results = [
        sampler(
            torch.randn(rows, 16, 2, 2, generator=torch.Generator().manual_seed(0)),
            num_inference_steps=3, guidance_scale=scale, output_type="latent",
            generator=generators_from_seeds(range(rows)), progress=False, return_dict=False,
        )
        for scale in (0.0, 4.0)
    ]  # fmt: skip
    assert torch.equal(*results)


class FakeConditioning(NamedTuple):
    """Conditioning that shows what the network was given."""

    text: Tensor
    step: int = -1

    def at_step(self, step: int) -> "FakeConditioning":
        return self._replace(step=step)

    def first_rows(self, count: int) -> "FakeConditioning":
        return self._replace(text=self.text[:count])


class Run(StepState):
    """A run of the loop whose predictions are the text embeddings themselves."""

    def __init__(self, times: Sequence[float] = (1.0, 0.6, 0.2, 0.0), **guidance: Any) -> None:
        self.times, self.guidance = times, Guidance(**guidance)
        self.cached: list[dict[str, Tensor]] = []
        self.rows: list[tuple[int, int]] = []  # (step, rows of the conditioning)
        self.latents = torch.tensor([[1.0], [2.0]])
        positive, negative = torch.tensor([[0.5], [0.25]]), torch.tensor([[-1.0], [-2.0]])
        self.tensors = {TEXT: torch.cat([positive, negative]), NEGATIVE: negative}

    def __call__(self, callback: Any = None, inputs: Sequence[str] = (), **options: Any) -> Tensor:
        def cache(tensors: Mapping[str, Tensor]) -> list[Any]:
            self.cached.append(dict(tensors))
            return [FakeConditioning(tensors[TEXT])]

        def predict(xt: Tensor, conditioning: Sequence[Any]) -> Tensor:
            self.rows.append((conditioning[0].step, len(conditioning[0].text)))
            return conditioning[0].text

        config = DenoiseConfig(times=self.times, guidance=self.guidance, method="ddim")
        params = DenoiseParams(
            config=config, generator=None, callback=callback, callback_inputs=inputs
        )
        return denoise(
            predict, cache, self.latents, self.tensors, params,
            sampler=self, solver=continuous_solver(params, SCHEDULE), **options,
        )  # fmt: skip


def ddim(x: Tensor, times: Sequence[float], preds: Sequence[Tensor]) -> Tensor:
    """DDIM steps with known predictions."""
    for (t, t_next), pred in zip(pairwise(times), preds, strict=True):
        t, t_next = torch.full((len(x),), t), torch.full((len(x),), t_next)
        x = SCHEDULE.add_noise(SCHEDULE.predict_x0(x, t, pred), t_next, pred)
    return x


def test_predictions_are_guided_in_the_interval_only() -> None:
    """Elsewhere no unconditional prediction is computed."""
    loop = Run(scale=3.0, interval=(0.2, 0.6))
    positive, negative = loop.tensors[TEXT].chunk(2)
    guided = negative + 3 * (positive - negative)
    expected = ddim(loop.latents, loop.times, [positive, guided, guided])
    torch.testing.assert_close(loop(), expected)
    assert loop.rows == [(0, 2), (1, 4), (2, 4)]


def test_unguided_runs_have_conditional_rows_only() -> None:
    loop = Run(scale=1.0)
    positive = loop.tensors[TEXT][:2]
    loop.tensors = {TEXT: positive}
    torch.testing.assert_close(loop(), ddim(loop.latents, loop.times, [positive] * 3))
    assert loop.rows == [(0, 2), (1, 2), (2, 2)]

    def turn_on(state: Any, step: int, t: Tensor, tensors: dict) -> None:
        state._guidance_scale = 5.0

    again = Run(scale=1.0)
    again.tensors = {TEXT: positive}
    assert torch.equal(again(turn_on), loop())  # it cannot be turned on


def test_a_callback_changes_latents_and_text_and_sees_their_current_values() -> None:
    loop = Run(scale=2.0)
    new_negative, new_latents = torch.tensor([[4.0], [8.0]]), torch.tensor([[-3.0], [3.0]])
    seen: list[tuple[int, float, dict[str, Tensor | None]]] = []

    def change(state: Any, step: int, t: Tensor, tensors: dict) -> dict[str, Tensor] | None:
        assert state is loop
        seen.append((step, float(t), tensors))
        if step == 0:
            return {"latents": new_latents, "unknown": new_latents}
        return {NEGATIVE: new_negative.double()} if step == 1 else None

    positive, negative = loop.tensors[TEXT].chunk(2)
    result = loop(change, ["latents", NEGATIVE, "absent"])
    first, second = 2 * positive - negative, 2 * positive - new_negative
    expected = ddim(new_latents, loop.times[1:], [first, second])
    torch.testing.assert_close(result, expected)
    assert [(step, t) for step, t, _ in seen] == [
        (i, pytest.approx(t)) for i, t in enumerate(loop.times[:-1])
    ]
    assert all(tensors.keys() == {"latents", NEGATIVE, "absent"} for *_, tensors in seen)
    assert all(tensors["absent"] is None for *_, tensors in seen)
    after = [ddim(loop.latents, loop.times[:2], [first])]
    after += [ddim(new_latents, loop.times[1:3], [first]), expected]
    for (*_, tensors), latents in zip(seen, after, strict=True):
        torch.testing.assert_close(tensors["latents"], latents)
    negatives = [tensors[NEGATIVE] for *_, tensors in seen]
    assert all(torch.equal(n, negative) for n in negatives[:2])
    assert torch.equal(negatives[2], new_negative)
    # The text is encoded for the blocks at the start, and again only where it has changed.
    assert [set(tensors) for tensors in loop.cached] == [{TEXT, NEGATIVE}] * 2
    assert torch.equal(loop.cached[1][TEXT], torch.cat([positive, new_negative]))


def test_returning_a_text_unchanged_computes_nothing_again() -> None:
    loop = Run(scale=2.0)
    names = [TEXT, NEGATIVE]
    expected = Run(scale=2.0)()
    assert torch.equal(loop(lambda state, step, t, tensors: tensors, names), expected)
    assert len(loop.cached) == 1


def test_latents_are_adjusted_after_each_step_before_the_callback() -> None:
    loop = Run(scale=0.0)
    times: list[float] = []

    def halve(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return x / 2

    seen: list[Tensor] = []
    result = loop(
        lambda state, step, t, tensors: seen.append(tensors["latents"]), ["latents"],
        latents_hook=halve,
    )  # fmt: skip
    assert times == list(loop.times[1:])
    expected, positive = loop.latents, loop.tensors[TEXT][:2]
    for pair, x in zip(pairwise(loop.times), seen, strict=True):
        expected = ddim(expected, pair, [positive]) / 2
        torch.testing.assert_close(x, expected)
    torch.testing.assert_close(result, expected)


def test_a_run_begins_with_its_own_state() -> None:
    idle = StepState()
    assert (idle.guidance_scale, idle.num_timesteps, idle.interrupt) == (0, 0, False)
    loop = Run(scale=1.5)
    loop._guidance_scale, loop._interrupt = 9.0, True
    loop()
    assert (loop.guidance_scale, loop.num_timesteps, loop.interrupt) == (1.5, 3, False)
    assert loop.do_classifier_free_guidance
    loop._guidance_scale = 1.0
    assert not loop.do_classifier_free_guidance
