"""Tokens: the authors' training loss and sampling runs, and exact distributions."""

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.golden_files import GOLDEN, golden, load
from tests.models.test_paella import arguments
from wuerstchen_pl.diffusion.guidance import Guidance
from wuerstchen_pl.diffusion.sampler import generators_from_seeds, rand
from wuerstchen_pl.diffusion.tokens import (
    choose_tokens,
    draw_tokens,
    is_replaced,
    random_tokens,
    replace_tokens,
    sample_token_times,
    sample_tokens,
    token_error,
    token_weights,
)
from wuerstchen_pl.models.paella import Paella
from wuerstchen_pl.models.vqgan import VQGAN

NAME = "stage_b_paella_v1_sampling"


@pytest.fixture(scope="module")
def io() -> dict[str, Tensor]:
    return golden(NAME)[2]


@pytest.fixture(scope="module")
def net() -> Paella:
    config, weights, _ = golden(NAME)
    network = Paella(**arguments(config), dropout=0.0)
    load(network, arguments(config), weights)
    return network


@pytest.fixture(scope="module")
def vqgan(io: dict[str, Tensor]) -> VQGAN:
    with safe_open(GOLDEN / f"{NAME}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["vqgan_config"])
    config["width"] = config.pop("c_hidden")
    config["latent_channels"] = config.pop("c_latent")
    network = VQGAN(**config)
    weights = {k.removeprefix("vqgan."): v for k, v in io.items() if k.startswith("vqgan.")}
    load(network, config, weights)
    return network


def runs() -> dict[str, Any]:
    with safe_open(GOLDEN / f"{NAME}.safetensors", "pt") as file:
        return json.loads(file.metadata()["runs"])


def test_the_training_loss_and_its_gradient_equal_the_authors(
    net: Paella, io: dict[str, Tensor]
) -> None:
    t, tokens = io["train.t"], io["train.tokens"]
    torch.testing.assert_close(sample_token_times(io["train.u"]), t)
    uniform = io["train.mask_uniform"]
    replaced = is_replaced(uniform, t)
    assert torch.equal(replaced, io["train.mask"].bool())
    noised = replace_tokens(tokens, io["train.random_x"], uniform, t)
    assert torch.equal(noised, io["train.noised"])
    weights = token_weights(replaced, t)
    expected = io["train.loss_weight"]
    torch.testing.assert_close(weights, expected / expected.sum(dim=(1, 2), keepdim=True))

    net.zero_grad()
    logits = net(noised, t, io["train.effnet"], io["train.byt5"])
    loss = token_error(logits, tokens, weights).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    assert float(loss.detach()) == pytest.approx(float(io["train.loss"]), abs=1e-5)
    assert float(norm) == pytest.approx(float(io["train.grad_norm"]), abs=1e-4)


@pytest.mark.parametrize("name", ["notebook", "argmax", "quant_end"])
def test_a_run_follows_the_authors_for_the_same_random_numbers(
    net: Paella, vqgan: VQGAN, io: dict[str, Tensor], name: str
) -> None:
    run = runs()[name]
    num_steps = run["steps"]
    semantic = torch.cat([io["train.effnet"], io["uncond.effnet"]])
    cond = net.cache_conditioning(semantic, torch.cat([io["train.byt5"], io["uncond.byt5"]]))
    masks = iter(io[f"{name}.mask_uniform"])
    all_logits, path = [], []

    def classify(tokens: Tensor, i: int) -> Tensor:
        t = torch.full((4,), run["t"][i])
        logits = net.predict_logits(torch.cat([tokens, tokens]), t, cond)
        all_logits.append(logits)
        return Guidance(scale=run["cfgs"][i]).combine(*logits.chunk(2))

    def choose(logits: Tensor, i: int) -> Tensor:
        if name == "argmax":
            tokens = choose_tokens(logits, "argmax", 1.0, no_numbers, vqgan.nearest_tokens)
        elif i < len(io[f"{name}.picked"]):
            tokens = io[f"{name}.picked"][i]
        else:
            temperature = run["temperatures"][i]
            tokens = choose_tokens(
                logits, "expected", temperature, no_numbers, vqgan.nearest_tokens
            )
        path.append(tokens)
        return tokens

    def keep(i: int, tokens: Tensor) -> Tensor:
        if i < num_steps - 1:
            path.append(tokens)
        return tokens

    tokens = sample_tokens(
        classify, io[f"{name}.init_noise"], run["t"], choose, lambda: next(masks), on_step=keep
    )
    assert torch.equal(torch.stack(path), io[f"{name}.path"])
    assert torch.equal(tokens, io[f"{name}.tokens"])
    if name == "notebook":
        for logits, expected in zip(
            (all_logits[0], all_logits[-1]), io["notebook.logits_first_last"], strict=True
        ):
            torch.testing.assert_close(logits, expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        images = vqgan.decode_features(vqgan.quantizer.lookup(tokens))
    torch.testing.assert_close(images, io[f"{name}.images"], atol=1e-5, rtol=0)


def no_numbers() -> Tensor:
    raise AssertionError("nothing is drawn")


def test_tokens_are_drawn_with_their_probabilities() -> None:
    """By the law of large numbers, and exactly at the borders of the cumulative probabilities."""
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    logits = probabilities.log()[None, :, None, None].expand(1, 4, 100, 1000)
    uniform = rand((1, 100, 1000), torch.Generator().manual_seed(0), torch.device("cpu"))
    tokens = draw_tokens(logits, 1.0, uniform)
    shares = torch.bincount(tokens.flatten(), minlength=4) / tokens.numel()
    torch.testing.assert_close(shares, probabilities, atol=5e-3, rtol=0)
    borders = torch.tensor([[[0.0, 0.0999, 0.1001, 0.6999, 0.7001, 1 - 2**-24]]])
    drawn = draw_tokens(logits[..., :1, :6], 1.0, borders)
    assert drawn.flatten().tolist() == [0, 0, 2, 2, 3, 3]


def test_the_temperature_divides_the_logits() -> None:
    logits = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 1, 100_000)
    uniform = torch.linspace(0, 1, 100_001)[:-1].view(1, 1, -1)
    for temperature in (0.25, 1.0, 4.0):
        share = float((draw_tokens(logits, temperature, uniform) == 0).float().mean())
        expected = torch.tensor([1.0, 0.0]).div(temperature).softmax(0)[0]
        assert share == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_a_share_of_the_tokens_is_replaced_and_uniform(t: float) -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.full((2, 200, 200), 7)
    uniform = rand((2, 200, 200), rng, torch.device("cpu")).clamp(min=1e-6)
    replacements = random_tokens(rand((2, 200, 200), rng, torch.device("cpu")), 4) + 100
    noised = replace_tokens(tokens, replacements, uniform, torch.full((2,), t))
    shares = [(noised == token).float().mean().item() for token in (7, 100, 101, 102, 103)]
    assert shares == pytest.approx([1 - t, *[t / 4] * 4], abs=5e-3)


def test_times_of_training_follow_their_closed_form() -> None:
    uniform = torch.linspace(0, 1, 100_001)
    t = sample_token_times(uniform)
    assert t.min() == pytest.approx(0.001)
    assert float((t == 1).float().mean()) == pytest.approx(1 - 0.999 / 1.08, abs=1e-4)


def test_an_image_does_not_depend_on_its_batch() -> None:
    """With a generator per image and a classifier that treats its rows alike."""
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def sampled(seeds: list[int]) -> Tensor:
        generators = generators_from_seeds(seeds)
        shape, cpu = (len(seeds), 4, 4), torch.device("cpu")
        return sample_tokens(
            lambda tokens, i: table[tokens].permute(0, 3, 1, 2),
            random_tokens(rand(shape, generators, cpu), 8),
            torch.linspace(1, 0, 6).tolist(),
            lambda logits, i: draw_tokens(logits, 1.0, rand(shape, generators, cpu)),
            lambda: rand(shape, generators, cpu),
        )

    together = sampled([3, 5, 9])
    for row, seed in enumerate([3, 5, 9]):
        assert torch.equal(together[row], sampled([seed])[0])
    assert len({tuple(image.flatten().tolist()) for image in together}) == 3


def test_exact_sampling_of_independent_tokens() -> None:
    """A classifier that knows the distribution of the tokens: samples have it at the end."""
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    logits = probabilities.log()[None, :, None, None].expand(1, 3, 100, 300)
    rng, cpu = torch.Generator().manual_seed(1), torch.device("cpu")
    shape = (1, 100, 300)
    for renoise_steps in (None, 0):
        tokens = sample_tokens(
            lambda tokens, i: logits,
            random_tokens(rand(shape, rng, cpu), 3),
            [1.0, 0.5, 0.0],
            lambda logits, i: draw_tokens(logits, 1.0, rand(shape, rng, cpu)),
            lambda: rand(shape, rng, cpu),
            renoise_steps=renoise_steps,
        )
        shares = torch.bincount(tokens.flatten(), minlength=3) / tokens.numel()
        torch.testing.assert_close(shares, probabilities, atol=8e-3, rtol=0)


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="choice='best' is unknown; choose from multinomial"):
        choose_tokens(torch.zeros(1, 2, 1, 1), "best", 1.0, no_numbers, lambda p: p)  # type: ignore[arg-type]
