"""Blocks that keep less, or are compiled, compute what they did."""

from functools import partialmethod

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import STAGES
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.wrapping import checkpoint_activations, compile_blocks, find_blocks
from wuerstchen_pl.stages.stage import Stage


def prior(dropout: float) -> Prior:
    torch.manual_seed(0)
    net = Prior(width=16, depth=6, num_heads=2, text_dim=8, dropout=dropout)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    return net.train()


def gradients(net: Prior) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 16, 4, 4, generator=rng), torch.randn(2, 3, 8, generator=rng)
    torch.manual_seed(1)  # of the dropout
    net(x, torch.tensor([0.2, 0.7]), text).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def kept(net: Prior) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, text = torch.randn(8, 16, 8, 8), torch.randn(8, 3, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = net(x, torch.rand(8), text)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert out.requires_grad
    return sum(size for place, size in sizes.items() if place not in weights)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_blocks_have_the_same_gradients(dropout: float) -> None:
    plain, spare = prior(dropout), prior(dropout)
    checkpoint_activations(spare)
    pairs = list(zip(gradients(plain), gradients(spare), strict=True))
    assert len(pairs) == len(list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert plain.state_dict().keys() == spare.state_dict().keys()


def test_checkpointed_blocks_keep_a_fraction() -> None:
    plain, spare = prior(0.1), prior(0.1)
    checkpoint_activations(spare)
    assert kept(spare) < kept(plain) / 6


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients_and_names() -> None:
    plain, fast = prior(0.0), prior(0.0)
    compile_blocks(fast)
    for a, b in zip(gradients(plain), gradients(fast), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-3
    assert plain.state_dict().keys() == fast.state_dict().keys()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_are_compiled_checkpointed_or_not(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend)
    )
    plain, fast = prior(0.0), prior(0.0)
    if checkpointed:
        checkpoint_activations(fast)
    compile_blocks(fast)
    found = gradients(fast)
    assert graphs
    for a, b in zip(gradients(plain), found, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_parts_are_left_as_they_are() -> None:
    stage: Stage = STAGES["c"]()
    frozen = [id(block) for part in stage.frozen.values() for block in find_blocks(part)]
    assert frozen
    assert not {id(block) for block in find_blocks(stage)} & set(frozen)
