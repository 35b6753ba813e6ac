"""Adapters: no effect at first, the same effect merged and not, for every layer they allow."""

import copy
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wuerstchen_pl.adapters.adapter import DEFAULT_TARGETS, Adapter, Method
from wuerstchen_pl.adapters.targets import (
    adaptable_layers,
    layer_names,
    split_projections,
)
from wuerstchen_pl.adapters.weights import merged_tensors
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder

METHODS: tuple[Method, ...] = ("lora", "dora", "loha", "lokr")
PRIOR: dict[str, Any] = {"width": 16, "depth": 2, "num_heads": 2, "text_dim": 8, "dropout": 0.0}
DIFFNEXT: dict[str, Any] = {
    "widths": [8, 16], "num_blocks": [1, 1], "num_heads": [None, 2], "semantic_channels": 16,
    "inject_semantic": [False, True], "cond_dim": 8, "text_dim": 8, "dropout": 0.0,
}  # fmt: skip


TEXT: dict[str, Any] = {"width": 16, "depth": 2, "num_heads": 2, "context_length": 8}
CAPTIONS = ["red apple", "a green frog on a leaf"]


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "text":
        return TextEncoder(**TEXT).eval()
    network = Prior(**PRIOR) if kind == "prior" else DiffNeXt(**DIFFNEXT)
    with torch.no_grad():
        for parameter in network.parameters():  # some are 0 when they are initialized
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        network.head.weight.mul_(0.1)  # else the quotient of the prior's heads is ill-conditioned
    return network.eval()


def outputs(network: Any, kind: str) -> tuple[Tensor, Tensor]:
    """The output, and that with cached conditioning, as in sampling."""
    if kind == "text":
        return network(CAPTIONS), network(CAPTIONS[:1])
    rng = torch.Generator().manual_seed(1)
    t = torch.tensor([0.4, 0.4])
    text = torch.randn(2, 5, 8, generator=rng)
    if kind == "prior":
        xt = torch.randn(2, 16, 4, 4, generator=rng)
        cached = network.cache_conditioning(t[:1], text)
        return network(xt, t, text), network.predict_noise(xt, [c.at_step(0) for c in cached])
    xt = torch.randn(2, 4, 16, 16, generator=rng)
    semantic = torch.randn(2, 16, 3, 3, generator=rng)
    cached = network.cache_conditioning(t[:1], semantic, text, (16, 16))
    fast = network.predict_noise(xt, [c.at_step(0) for c in cached])
    return network(xt, t, semantic, text), fast


def randomize(network: nn.Module) -> None:
    torch.manual_seed(2)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.3


def layers_of(kind: str) -> list[str]:
    network = build(kind)
    split_projections(network)
    return list(adaptable_layers(network))


KINDS = ("prior", "diffnext", "text")
CASES = [(kind, layer) for kind in KINDS for layer in layers_of(kind)]


def difference(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_split_projections_compute_the_same(kind: str) -> None:
    network = build(kind)
    before, names = outputs(network, kind), layer_names(network)
    split_projections(network)
    assert difference(outputs(network, kind), before) < 1e-6
    assert sorted(adaptable_layers(network)) == sorted(names)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_new_adapter_changes_nothing(kind: str, method: Method) -> None:
    network = build(kind)
    before = outputs(network, kind)
    Adapter(method=method, rank=2, targets=["*"]).add_to(network)
    assert difference(outputs(network, kind), before) < 1e-5


@pytest.mark.parametrize(("kind", "layer"), CASES)
@torch.no_grad()
def test_every_layer_has_the_same_effect_merged_and_not(kind: str, layer: str) -> None:
    for method in METHODS:
        network = build(kind)
        before, state = outputs(network, kind), copy.deepcopy(network.state_dict())
        adapter = Adapter(method=method, rank=2, alpha=3.0, targets=[layer])
        adapter.add_to(network)
        randomize(network)
        with_adapter = outputs(network, kind)
        merged = build(kind)
        weights = adapter.weights(network.state_dict())
        assert list(weights) == [layer]
        merged.load_state_dict(merged_tensors(state, [(weights, 1.0)]))
        assert difference(outputs(merged, kind), with_adapter) < 2e-5, method
        assert difference(with_adapter, before) > 2e-4, method
        unchanged = merged_tensors(state, [(weights, 0.0)])
        assert all(torch.equal(unchanged[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        ("prior", "*.depthwise", "matches blocks.0.res.depthwise, but only "),
        ("diffnext", "down.1.*expand", "read no semantic latents can have an adapter"),
        ("prior", "stem", "matches stem, but only "),
        ("prior", "*.attn1.*", "matches no layer; use patterns of names such as"),
    ],
)
def test_a_pattern_without_adaptable_layers_is_refused(
    kind: str, pattern: str, message: str
) -> None:
    network = build(kind)
    with pytest.raises(ValueError, match=re.escape(message)):
        Adapter(targets=[*DEFAULT_TARGETS, pattern]).add_to(network)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0 is out of range"),
        ({"dropout": 1.0}, "dropout=1.0 is out of range"),
        ({"method": "ia3"}, "method='ia3' is unknown"),
        ({"base_dtype": "float16"}, "base_dtype='float16' is unknown"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter(**arguments)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"stage.adapter needs peft.*pip install .*\[adapters\]"):
        Adapter().add_to(build("prior"))
