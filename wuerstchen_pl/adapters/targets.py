"""The layers of a network that can have an adapter, and their choice by patterns."""

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from wuerstchen_pl.models.layers import Attention, ResBlock
from wuerstchen_pl.models.qkv import FusedQKV, SplitQKV
from wuerstchen_pl.models.text_attention import SplitAttention


def split_projections(network: nn.Module) -> None:
    """Give queries, keys and values a layer each, in place."""
    for module in list(network.modules()):
        if isinstance(module, Attention) and isinstance(module.qkv, FusedQKV):
            module.qkv = SplitQKV(module.qkv.weight, module.qkv.bias)
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, SplitAttention(child))


def adaptable_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers that are only used by a call, by name, after ``split_projections``.

    An adapter of another layer would have no effect: Stage B's blocks use slices of the weight of
    a layer that reads semantic latents.
    """
    sliced = set(_sliced(network))
    return {
        name: module
        for name, module in network.named_modules()
        if type(module) is nn.Linear and name not in sliced
    }


def layer_names(network: nn.Module) -> list[str]:
    """The names of the adaptable layers after ``split_projections``, which is not called."""
    names = list(adaptable_layers(network))
    for name, module in network.named_modules():
        if isinstance(module, FusedQKV):
            names += [f"{name}.to_{which}" for which in "qkv"]
        elif isinstance(module, nn.MultiheadAttention):
            names += [f"{name}.in_proj.to_{which}" for which in "qkv"] + [f"{name}.out_proj"]
    return names


def _sliced(network: nn.Module) -> Iterator[str]:
    for name, module in network.named_modules():
        if isinstance(module, ResBlock) and module.expand.in_features > module.main_channels:
            yield f"{name}.expand"


def choose_layers(network: nn.Module, patterns: Sequence[str], key: str) -> list[str]:
    """The names of adaptable layers that match one of the patterns, such as ``*.attention.*``.

    Args:
        network: before or after ``split_projections``.
        patterns: as for ``fnmatch``, of names such as ``blocks.0.attn.attention.qkv.to_q``.
        key: of the adapter, for messages.

    Raises:
        ValueError: if a pattern matches no layer, or none that can have an adapter.
    """
    layers = layer_names(network)
    for pattern in patterns:
        if fnmatch.filter(layers, pattern):
            continue
        unadaptable = fnmatch.filter((name for name, _ in network.named_modules()), pattern)
        if unadaptable:
            raise ValueError(
                f"{key}.targets has {pattern!r}, which matches {unadaptable[0]}, but only linear "
                "layers that read no semantic latents can have an adapter; choose such layers, for "
                f"example {layers[0]}"
            )
        raise ValueError(
            f"{key}.targets has {pattern!r}, which matches no layer; use patterns of names such as "
            f"{layers[0]}"
        )
    return [name for name in layers if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
