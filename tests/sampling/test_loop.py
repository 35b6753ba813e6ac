"""Callbacks of a running sampler, and guidance of a network without conditioning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import generators_from_seeds
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.vqgan import VQGAN
from wuerstchen_pl.sampling.decoder import DecoderSampler
from wuerstchen_pl.sampling.prior import PriorSampler

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
    """It applies from the second step, like a replacement of both halves of the text states."""
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
    sampler = DecoderSampler(decoder=net.eval(), vqgan=vqgan.eval(), latent_dim_scale=4)
    results = [
        sampler(
            torch.randn(rows, 16, 2, 2, generator=torch.Generator().manual_seed(0)),
            num_inference_steps=3, guidance_scale=scale, output_type="latent",
            generator=generators_from_seeds(range(rows)), progress=False, return_dict=False,
        )
        for scale in (0.0, 4.0)
    ]  # fmt: skip
    assert torch.equal(*results)
