"""Arguments of a sampling run: initial latents, settings, callbacks and prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from wuerstchen_pl.diffusion.sampler import generators_from_seeds, randn
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.sampling.config import SamplingConfig
from wuerstchen_pl.sampling.diffusers_arguments import denoise_params, with_legacy_callback
from wuerstchen_pl.sampling.initial_latents import expand_rows, initial_noise, times_from
from wuerstchen_pl.sampling.prompts import Prompts, count_prompts, encode_prompts, encode_texts

CPU = torch.device("cpu")


# Initial latents


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


# Settings


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
        guidance_interval=[0.1, 0.9], decoder_steps=4, decoder_guidance_scale=5.0, sampler="ddim",
    )  # fmt: skip
    prior, decoder = config.prior, config.decoder
    assert prior.times == [1.0, 0.5, 0.0]
    assert decoder.times == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert (prior.guidance.scale, decoder.guidance.scale) == (3.0, 5.0)
    assert (prior.guidance.rescale, decoder.guidance.rescale) == (0.25, 0.0)
    assert (prior.guidance.interval, decoder.guidance.interval) == ((0.1, 0.9), (0.0, 1.0))
    assert prior.method == decoder.method == "ddim"
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
        ({"sampler": "euler"}, "sampler='euler' is unknown"),
        ({"prior_timesteps": [0.1, 0.5]}, "are not decreasing"),
        ({"guidance_interval": [0.5, 0.5]}, "is empty"),
    ],
)
def test_wrong_settings_are_rejected_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**settings)


# Callbacks


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


# Prompts


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(width=16, depth=1, num_heads=2, context_length=8).eval()


def encode(encoder: TextEncoder, repeats: int = 1, guided: bool = True, **prompts: Any) -> Tensor:
    with torch.no_grad():
        return encode_prompts(encoder, Prompts(**prompts), repeats=repeats, guided=guided)


def test_each_prompt_is_repeated_and_followed_by_the_negative_ones(encoder: TextEncoder) -> None:
    with torch.no_grad():
        cat, dog, blue, red, empty = encoder(["cat", "dog", "blue", "red", ""])
    pair = {"prompt": ["cat", "dog"]}
    two = {**pair, "negative": ["blue", "red"]}
    for prompts, repeats, guided, rows in (
        (pair, 1, False, [cat, dog]),
        (pair, 2, False, [cat, cat, dog, dog]),
        (pair, 1, True, [cat, dog, empty, empty]),
        ({**pair, "negative": "blue"}, 1, True, [cat, dog, blue, blue]),
        ({**pair, "negative": ["blue"]}, 1, True, [cat, dog, blue, blue]),
        (two, 1, True, [cat, dog, blue, red]),
        (two, 2, True, [cat, cat, dog, dog, blue, blue, red, red]),
        ({**pair, "negative": "blue"}, 1, False, [cat, dog]),
        ({"prompt": "cat"}, 2, True, [cat, cat, empty, empty]),
        ({"prompt": ["cat", "dog", "cat"]}, 1, False, [cat, dog, cat]),
    ):  # fmt: skip
        actual = encode(encoder, repeats, guided, **prompts)
        torch.testing.assert_close(actual, torch.stack(rows))


def test_embeddings_replace_texts(encoder: TextEncoder) -> None:
    with torch.no_grad():
        embeds, negative = encoder(["cat", "dog"]), encoder(["blue", "red"])
    expected = encode(encoder, 2, prompt=["cat", "dog"], negative=["blue", "red"])
    for prompts in (
        {"embeds": embeds, "negative_embeds": negative},
        {"embeds": embeds, "negative": ["blue", "red"]},
        {"prompt": ["cat", "dog"], "negative_embeds": negative},
        {"prompt": ["cat", "dog"], "negative_embeds": negative.double()},
    ):
        torch.testing.assert_close(encode(encoder, 2, **prompts), expected)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "neither prompt nor prompt_embeds"),
        ({"negative": "a"}, "neither prompt nor prompt_embeds"),
        ({"prompt": "a", "embeds": torch.zeros(1, 8, 16)}, "prompt and prompt_embeds are both"),
        (
            {"prompt": "a", "negative": "b", "negative_embeds": torch.zeros(1, 8, 16)},
            "negative_prompt and negative_prompt_embeds are both",
        ),
        ({"prompt": ["a", "b", "c"], "negative": ["d", "e"]}, "2 negative prompts for 3"),
        ({"embeds": torch.zeros(2, 8, 16), "negative": ["d"] * 3}, "3 negative prompts for 2"),
        ({"prompt": ["a", 1]}, "is not text"),
        ({"prompt": {"a": 1}}, "is not text"),
        ({"prompt": "a", "negative": []}, r"negative_prompt=\[\] is not text"),
    ],
)
def test_inconsistent_prompts_are_rejected(prompts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_prompts(Prompts(**prompts))


def test_prompts_are_counted_as_texts_or_embeddings() -> None:
    assert count_prompts(Prompts("a")) == 1
    assert count_prompts(Prompts("")) == 1
    assert count_prompts(Prompts(("a", "b"), "c")) == 2
    assert count_prompts(Prompts(embeds=torch.zeros(3, 8, 16), negative=["a", "b", "c"])) == 3


@pytest.mark.parametrize("shape", [(8,), (8, 16), (1, 8, 17), (1, 1, 8, 16)])
def test_embeddings_of_another_shape_are_rejected(
    shape: tuple[int, ...], encoder: TextEncoder
) -> None:
    with pytest.raises(ValueError, match="prompt_embeds have shape"):
        encode(encoder, embeds=torch.zeros(shape))


@pytest.mark.parametrize("repeats", [0, -1, 1.5])
def test_a_number_of_images_out_of_range_is_rejected(repeats: int, encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=f"num_images_per_prompt={repeats} is out of range"):
        encode(encoder, repeats, prompt="a")


def test_a_truncated_caption_is_warned_about_once(encoder: TextEncoder) -> None:
    long = "apple " * 6 + "red heart"
    with pytest.warns(UserWarning, match="reads 8 tokens") as shown:
        encode_texts(encoder, [long, "cat", long])
    assert len(shown) == 1
