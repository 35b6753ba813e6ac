"""The layers of a denoiser that can have an adapter, and their choice by patterns."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from wuerstchen_pl.models.layers import Attention, ResBlock
from wuerstchen_pl.models.qkv import FusedQKV, SplitQKV


def split_projections(network: nn.Module) -> None:
    """Give queries, keys and values a layer each, in place."""
    for module in network.modules():
        if isinstance(module, Attention) and isinstance(module.qkv, FusedQKV):
            module.qkv = SplitQKV(module.qkv)


def fuse_projections(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the network before ``split_projections``."""
    fused = {}
    for name, tensor in state.items():
        before, _, kind = name.rpartition(".qkv.to_q.")
        if before:
            parts = [state[f"{before}.qkv.to_{which}.{kind}"] for which in "qkv"]
            fused[f"{before}.qkv.{kind}"] = torch.cat(parts)
        elif ".qkv.to_" not in name:
            fused[name] = tensor
    return fused


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
    fused = [name for name, module in network.named_modules() if isinstance(module, FusedQKV)]
    return [
        *adaptable_layers(network),
        *(f"{name}.to_{which}" for name in fused for which in "qkv"),
    ]


def _sliced(network: nn.Module) -> Iterator[str]:
    for name, module in network.named_modules():
        if isinstance(module, ResBlock) and module.expand.in_features > module.main_channels:
            yield f"{name}.expand"


def choose_layers(network: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The adaptable layers whose names match one of the patterns, such as ``*.attention.*``.

    Args:
        network: after ``split_projections``.
        patterns: as for ``fnmatch``, of names such as ``blocks.0.attn.attention.qkv.to_q``.

    Raises:
        ValueError: if a pattern matches no layer, or none that can have an adapter.
    """
    layers = adaptable_layers(network)
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in layers):
            continue
        unadaptable = [name for name, _ in network.named_modules() if fnmatchcase(name, pattern)]
        if unadaptable:
            raise ValueError(
                f"stage.adapter.targets has {pattern!r}, which matches {unadaptable[0]}, but only "
                "linear layers that read no semantic latents can have an adapter; choose such "
                "layers, for example *.attention.*"
            )
        raise ValueError(
            f"stage.adapter.targets has {pattern!r}, which matches no layer; use patterns such as "
            "*.attention.*"
        )
    return {
        name: layer
        for name, layer in layers.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
