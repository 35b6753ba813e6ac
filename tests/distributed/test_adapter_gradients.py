"""Blocks with an adapter have the same gradients if they are sharded, recomputed or compiled."""

from collections.abc import Callable

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from tests.adapters.test_adapter import METHODS, build, randomize
from wuerstchen_pl.adapters.adapter import Adapter, Method
from wuerstchen_pl.distributed.fsdp2 import full_tensor
from wuerstchen_pl.models.activations import checkpoint_activations
from wuerstchen_pl.models.wrapping import compile_blocks, find_blocks


def gradients(method: Method, wrap: Callable[[nn.Module], None]) -> dict[str, Tensor]:
    """The gradients of a prior with an adapter of all layers, in training mode."""
    network = build("prior")
    Adapter(method=method, rank=2, targets=["*"]).add_to(network)
    randomize(network)
    wrap(network)
    rng = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 4, 4, generator=rng), torch.randn(2, 5, 8, generator=rng)
    network(x, torch.tensor([0.2, 0.7]), text).square().mean().backward()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with_gradient = {name for name, p in network.named_parameters() if p.grad is not None}
    assert with_gradient == trained.keys()
    return {name: full_tensor(p.grad) for name, p in trained.items() if p.grad is not None}


def unchanged(network: nn.Module) -> None:
    pass


@pytest.mark.parametrize("method", METHODS)
def test_sharded_blocks(method: Method, mesh_of_one: DeviceMesh) -> None:
    """Of which some weights are trained, and others are not."""

    def shard(network: nn.Module) -> None:
        for block in find_blocks(network):
            fully_shard(block, mesh=mesh_of_one)
        fully_shard(network, mesh=mesh_of_one)

    torch.testing.assert_close(gradients(method, shard), gradients(method, unchanged))


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_activations(method: Method) -> None:
    recomputed, plain = gradients(method, checkpoint_activations), gradients(method, unchanged)
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "lora")]
)
def test_compiled_blocks(method: Method, graphs: list[torch.fx.GraphModule]) -> None:
    """One graph a block with LoRA. Dynamo cannot trace all of what peft does for the others."""
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = gradients(method, compile_blocks)
    torch.testing.assert_close(compiled, gradients(method, unchanged))
    if method == "lora":
        assert not counters["graph_break"]
        assert len(graphs) == 2


@pytest.mark.slow
def test_blocks_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    compiled, plain = gradients("lora", compile_blocks), gradients("lora", unchanged)
    for name, gradient in plain.items():
        assert float((compiled[name] - gradient).norm() / gradient.norm()) < 1e-3, name
