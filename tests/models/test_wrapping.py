"""Compilation does not change what blocks compute."""

import pytest
import torch
from torch import Tensor

from tests.stages.conftest import STAGES
from wuerstchen_pl.models.activations import checkpoint_activations
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.wrapping import compile_blocks, find_blocks
from wuerstchen_pl.stages.stage import Stage


def prior(dropout: float) -> Prior:
    torch.manual_seed(0)
    net = Prior(width=16, depth=6, num_heads=2, text_dim=8, dropout=dropout)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    return net.train()


def gradients(net: Prior) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 16, 4, 4, generator=rng), torch.randn(2, 3, 8, generator=rng)
    torch.manual_seed(1)  # for the dropout
    net(x, torch.tensor([0.2, 0.7]), text).square().mean().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.slow
def test_compiled_blocks_have_the_same_gradients_and_names() -> None:
    plain, compiled = prior(0.0), prior(0.0)
    compile_blocks(compiled)
    for a, b in zip(gradients(plain), gradients(compiled), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-3
    assert plain.state_dict().keys() == compiled.state_dict().keys()


@pytest.mark.parametrize("checkpointed", ["not", "before", "after"])
def test_blocks_are_compiled_with_and_without_checkpointing(
    checkpointed: str, graphs: list[torch.fx.GraphModule]
) -> None:
    plain, compiled = prior(0.0), prior(0.0)
    if checkpointed == "before":
        checkpoint_activations(compiled)
    compile_blocks(compiled)
    if checkpointed == "after":  # by the memory estimate, before the first compiled call
        checkpoint_activations(compiled)
    compiled_gradients = gradients(compiled)
    assert any("checkpoint" in graph.code for graph in graphs) == (checkpointed != "not")
    for a, b in zip(gradients(plain), compiled_gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_blocks_of_frozen_networks_are_not_part_of_a_stage() -> None:
    stage: Stage = STAGES["c"]()
    frozen = [id(block) for part in stage.frozen.values() for block in find_blocks(part)]
    assert frozen
    assert not {id(block) for block in find_blocks(stage)} & set(frozen)
