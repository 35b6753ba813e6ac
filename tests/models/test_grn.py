"""GELU with the global response norm: its gradients and the memory that it saves."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wuerstchen_pl.models import grn
from wuerstchen_pl.models.grn import EPS, GeluGRN


def reference(u: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The paper's formula in separate operations."""
    x = F.gelu(u)
    norm = (x.square().sum(dim=(1, 2), keepdim=True) + 1e-12).sqrt()
    return gamma * (x * norm / (norm.mean(dim=-1, keepdim=True) + EPS)) + beta + x


def norm_and_input(dtype: torch.dtype) -> tuple[GeluGRN, Tensor]:
    rng = torch.Generator().manual_seed(0)
    norm = GeluGRN(5).to(dtype)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(5, generator=rng))
    return norm, torch.randn(2, 3, 4, 5, generator=rng).to(dtype).requires_grad_()


def test_values_and_gradients_equal_those_of_separate_operations() -> None:
    norm, u = norm_and_input(torch.float64)
    torch.testing.assert_close(norm(u), reference(u, norm.gamma, norm.beta))
    inputs = (u, norm.gamma, norm.beta)
    assert torch.autograd.gradcheck(lambda *_: norm(u), inputs)
    weight = torch.randn(u.shape, dtype=u.dtype, generator=torch.Generator().manual_seed(1))
    actual = torch.autograd.grad((norm(u) * weight).sum(), inputs)
    expected = torch.autograd.grad((reference(*inputs) * weight).sum(), inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gradients_in_bfloat16_are_close_to_those_in_float64() -> None:
    norm, u = norm_and_input(torch.bfloat16)
    norm.float()  # as under autocast: float32 weights, bfloat16 between linear layers
    (norm(u).float() * 0.5).sum().backward()
    exact = u.detach().double().requires_grad_()
    gamma, beta = (p.detach().double().requires_grad_() for p in (norm.gamma, norm.beta))
    (reference(exact, gamma, beta) * 0.5).sum().backward()
    for actual, expected in ((u, exact), (norm.gamma, gamma), (norm.beta, beta)):
        assert actual.grad is not None
        assert expected.grad is not None
        scale = expected.grad.abs().max()
        assert float((actual.grad.double() - expected.grad).abs().max() / scale) < 2e-2


@pytest.mark.parametrize("part", [1, 64 * 40 * 16, 2**18])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-6), (torch.bfloat16, 1e-3)],
)
def test_norms_are_closer_than_a_rounding_whatever_the_parts(
    dtype: torch.dtype, tolerance: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many positions, in which most squares are small beside their sum."""
    monkeypatch.setattr(grn, "PART", part)
    u = 3 * torch.randn(2, 48, 40, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = u.clone()
    norm = grn._gelu_grn(u, torch.zeros(16), torch.zeros(16))[1]
    exact = F.gelu(u).double().square().sum(dim=(1, 2), keepdim=True).sqrt()
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert ((norm - exact) / exact).abs().max() < tolerance
    assert torch.equal(u, kept), "it is computed again in the backward pass"


def test_an_empty_batch_gives_an_empty_batch() -> None:
    assert GeluGRN(5)(torch.zeros(0, 2, 2, 5)).shape == (0, 2, 2, 5)


def test_a_channel_of_zeros_has_finite_gradients() -> None:
    norm, _ = norm_and_input(torch.float32)
    u = torch.zeros(1, 2, 2, 5, requires_grad=True)
    norm(u).sum().backward()
    assert u.grad is not None
    assert u.grad.isfinite().all()


def test_it_saves_one_tensor_of_the_size_of_its_input() -> None:
    norm, u = norm_and_input(torch.float32)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        norm(u)
    fused, saved[:] = sum(saved), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        reference(u, norm.gamma, norm.beta)
    assert fused < 1.5 * u.numel() < 2.5 * u.numel() < sum(saved)


Graphs = list[torch.fx.GraphModule]


def compiled_norm(dtype: torch.dtype) -> GeluGRN:
    """The norm of ``norm_and_input``, in a single graph."""
    norm, _ = norm_and_input(dtype)
    norm.compile(fullgraph=True)
    return norm


def test_compiled_for_sampling_on_a_cpu_it_is_one_operation(graphs: Graphs) -> None:
    norm, u = norm_and_input(torch.float32)
    compiled = compiled_norm(torch.float32)
    with torch.no_grad():
        assert torch.equal(compiled(u), norm(u))
    torch.testing.assert_close(compiled(u), norm(u))
    sampling, training = (graph.code for graph in graphs)
    assert "wuerstchen_pl.gelu_grn" in sampling
    assert "wuerstchen_pl.gelu_grn" not in training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compiled_for_training_it_has_the_same_gradients(
    dtype: torch.dtype, graphs: Graphs
) -> None:
    """And returns no tensor that it wrote to, whose gradient would be zero in torch 2.11."""
    norm, u = norm_and_input(dtype)
    weight = torch.randn(u.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual, expected = (
        torch.autograd.grad((net(u) * weight).sum(), (u, net.gamma, net.beta))
        for net in (compiled_norm(dtype), norm)
    )
    torch.testing.assert_close(actual, expected)
    parts = [part for part in graphs[0].modules() if isinstance(part, torch.fx.GraphModule)]
    nodes = [node for part in parts for node in part.graph.nodes]
    assert len(nodes) > 20  # of the forward and backward parts
    assert not [node for node in nodes if node.kwargs.get("out") is not None]
