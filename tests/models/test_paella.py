"""Stage B of version 1 against the authors' code: size, arguments and outputs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden_files import golden, load
from wuerstchen_pl.models.paella import Paella

INPUTS = ("x", "r", "effnet", "byt5")
# Our constructor arguments, the published weights, the inputs and outputs.
Golden = tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]
# train_stage_B.py: the constructor's defaults, with CLIP-H's text embeddings (1024), not ByT5's.
PUBLISHED: dict[str, Any] = {
    "widths": [640, 1280, 1280],
    "num_blocks": [4, 12, 4],
    "num_heads": [None, 16, 16],
    "cond_dim": 1024,
    "text_dim": 1024,
}


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Map the authors' constructor arguments to this package's."""
    assert config["c_in"] == config["c_out"]
    return {
        "codebook_size": config["num_labels"],
        "token_dim": config["c_in"],
        "semantic_channels": config["effnet_embd"],
        "patch_size": config["patch_size"],
        "widths": config["c_hidden"],
        "num_blocks": config["blocks"],
        "num_heads": [n if n > 0 else None for n in config["nhead"]],
        "cond_dim": config["c_cond"],
        "text_dim": config["byt5_embd"],
        "time_dim": config["c_r"],
    }


@pytest.fixture(scope="module")
def published() -> Golden:
    config, weights, io = golden("stage_b_paella_v1")
    return arguments(config), weights, io


@pytest.fixture
def net(published: Golden) -> Paella:
    args, weights, _ = published
    paella = Paella(**args)
    load(paella, args, weights)
    return paella


@pytest.fixture
def io(published: Golden) -> dict[str, Tensor]:
    return published[2]


def test_the_published_size() -> None:
    with torch.device("meta"):
        net = Paella(**PUBLISHED)
    assert sum(p.numel() for p in net.parameters()) == 730_814_336


@torch.no_grad()
def test_logits_equal_the_published_ones(net: Paella, io: dict[str, Tensor]) -> None:
    logits = net(*(io[name] for name in INPUTS))
    torch.testing.assert_close(logits, io["logits"], rtol=1e-4, atol=1e-4)
    assert io["logits"].std() > 0.1  # near-zero logits would prove little


@torch.no_grad()
@pytest.mark.parametrize("changed", INPUTS)
def test_every_input_is_read(net: Paella, io: dict[str, Tensor], changed: str) -> None:
    inputs = {name: io[name] for name in INPUTS}
    inputs[changed] = inputs[changed] * 0.5 if changed != "x" else (io["x"] + 1) % 64
    difference = (net(*inputs.values()) - io["logits"]).abs().flatten(1).amax(1)
    assert (difference > 1e-3).all()  # for every sample of the batch


@torch.no_grad()
def test_positions_of_semantic_latents_have_no_effect(net: Paella, io: dict[str, Tensor]) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    permuted = io["effnet"].flatten(2)[:, :, order].unflatten(2, (2, 6))
    logits = net(io["x"], io["r"], permuted, io["byt5"])
    torch.testing.assert_close(logits, io["logits"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_network_without_text_equals_one_without_text_input(
    net: Paella, io: dict[str, Tensor], published: Golden
) -> None:
    textless = Paella(**published[0] | {"text_dim": None}).eval()
    textless.load_state_dict(
        {k: v for k, v in net.state_dict().items() if not k.startswith("text_mapper.")}
    )
    x, r, effnet, _ = (io[name] for name in INPUTS)
    torch.testing.assert_close(textless(x, r, effnet), net(x, r, effnet, None))


def test_every_parameter_gets_a_gradient(net: Paella, io: dict[str, Tensor]) -> None:
    F.cross_entropy(net(*(io[name] for name in INPUTS)), io["x"]).backward()
    without = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@torch.no_grad()
def test_at_initialization_all_tokens_are_equally_likely(
    published: Golden, io: dict[str, Tensor]
) -> None:
    fresh = Paella(**published[0]).eval()
    assert not fresh(*(io[name] for name in INPUTS)).any()
    assert torch.equal(fresh.classifier.weight[:, :, 0, 0], fresh.token_embedding.weight)


def test_sizes_are_multiples_of_size_multiple(net: Paella, io: dict[str, Tensor]) -> None:
    inputs = [io[name] for name in INPUTS[1:]]
    assert net.size_multiple == 4
    assert net(io["x"][:, :12, :8], *inputs).shape == (2, 64, 12, 8)
    with pytest.raises(RuntimeError):
        net(io["x"][:, :14], *inputs)


@pytest.mark.parametrize("key", ["widths", "num_blocks", "num_heads"])
def test_lists_of_unequal_length_are_rejected(key: str) -> None:
    args = PUBLISHED | {key: PUBLISHED[key][:1]}
    message = rf"{key}=.* differ in length; give one entry of each per level"
    with pytest.raises(ValueError, match=message):
        Paella(**args)


@pytest.mark.parametrize("heads", [5, -1])
def test_heads_that_do_not_divide_the_width_are_rejected(heads: int) -> None:
    with pytest.raises(ValueError, match=f"num_heads={heads} does not divide the width 32"):
        Paella(widths=[32], num_blocks=[1], num_heads=[heads], cond_dim=32)
