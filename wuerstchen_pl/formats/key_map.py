"""Tensor names in the native, the upstream and the diffusers format.

The rules map native names to external ones; the inverse is derived from the same rules. Values do
not change, but some shapes do: published global response norms are (1, 1, 1, C), native ones (C);
diffusers stores query, key and value separately, the other two formats concatenate them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from wuerstchen_pl.formats.lazy_tensors import LazyTensor
from wuerstchen_pl.formats.model import (
    COMPRESSOR,
    DIFFNEXT,
    PAELLA,
    PRIOR,
    TEXT_ENCODER,
    VQGAN,
    compare_shapes,
)

ExternalFormat = Literal["upstream", "diffusers"]
Rules = list[tuple[str, str]]

_BLOCK_PARTS = {"res": 0, "time": 1, "attn": 2}
_BLOCK: Rules = [
    (r"^res\.depthwise\.", "depthwise."),
    (r"^res\.expand\.", "channelwise.0."),
    (r"^res\.grn\.", "channelwise.2."),
    (r"^res\.project\.", "channelwise.4."),
    (r"^time\.mapper\.", "mapper."),
    (r"^attn\.attention\.qkv\.", "attention.attn.in_proj_"),
    (r"^attn\.attention\.out\.", "attention.attn.out_proj."),
    (r"^attn\.cond_mapper\.", "kv_mapper.1."),
]
_PRIOR: Rules = [
    (r"^stem\.", "projection."),
    (r"^text_in\.", "cond_mapper.0."),
    (r"^text_out\.", "cond_mapper.2."),
    (r"^head\.", "out.1."),
]
_DIFFNEXT: Rules = [
    (r"^text_mapper\.", "clip_mapper."),
    (r"^stem\.", "embedding.1."),
    (r"^head\.", "clf.1."),
]
_PAELLA: Rules = [
    (r"^text_mapper\.", "byt5_mapper."),
    (r"^semantic_mapper\.", "effnet_mapper."),
    (r"^token_embedding\.", "in_mapper.0."),
    (r"^stem\.", "embedding.1."),
    (r"^head\.", "clf.1."),
    (r"^classifier\.", "out_mapper.1."),
]
_VQGAN: Rules = [
    (r"^stem\.", "in_block.1."),
    (r"^head\.", "out_block.0."),
    (r"^quantizer\.", "vquantizer."),
    (r"^from_latent\.", "up_blocks.0.0."),
]
_VQGAN_BLOCK: Rules = [
    (r"\bdepthwise\.", "depthwise.1."),
    (r"\bexpand\.", "channelwise.0."),
    (r"\bproject\.", "channelwise.2."),
]
_COMPRESSOR: Rules = [
    (r"^backbone\.features\.", "backbone."),
    (r"^mapper\.", "mapper.0."),
    (r"^norm\.", "mapper.1."),
]
_TEXT: Rules = [
    (r"^tower\.token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^tower\.positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^tower\.ln_final\.", "text_model.final_layer_norm."),
    (r"^tower\.transformer\.resblocks\.", "text_model.encoder.layers."),
]
_TEXT_LAYER: Rules = [
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.in_proj_", ".self_attn.in_proj_"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
]


class KeyMapping(NamedTuple):
    """A native tensor and its counterparts in an external format."""

    native: str
    external: tuple[str, ...]  # several are concatenated along dim 0 in the native one
    is_grn: bool  # native (C), external (1, 1, 1, C)


def key_mappings(
    config: Mapping[str, Any], keys: Iterable[str], format: ExternalFormat
) -> list[KeyMapping]:
    """The external names of a part's tensors, given the native ones."""
    target = config["_target_"]
    name_of = {
        PRIOR: _prior, DIFFNEXT: _u_net, PAELLA: _u_net, VQGAN: _vqgan, COMPRESSOR: _compressor,
        TEXT_ENCODER: _text,
    }[target]  # fmt: skip
    mappings = []
    for key in keys:
        name = name_of(key, config)
        external = (name,) if format == "upstream" else _for_diffusers(name, target)
        is_grn = target in (PRIOR, DIFFNEXT, PAELLA) and key.endswith((".gamma", ".beta"))
        mappings.append(KeyMapping(key, external, is_grn))
    return mappings


def to_external(
    tensors: Mapping[str, LazyTensor], table: Iterable[KeyMapping]
) -> dict[str, LazyTensor]:
    """Native tensors -> external ones."""
    converted: dict[str, LazyTensor] = {}
    for native, external, is_grn in table:
        lazy = tensors[native]
        for i, name in enumerate(external):
            shape = (1, 1, 1, *lazy.shape) if is_grn else lazy.shape
            if len(external) > 1:
                shape = (shape[0] // len(external), *shape[1:])
            converted[name] = LazyTensor(shape, lazy.dtype, _chunk(lazy, i, len(external), shape))
    return converted


def _chunk(
    lazy: LazyTensor, i: int, num_chunks: int, shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    if num_chunks == 1:
        return lambda: lazy.load().reshape(shape)
    return lambda: lazy.load().chunk(num_chunks)[i]


def from_external(
    tensors: Mapping[str, LazyTensor],
    table: list[KeyMapping],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> dict[str, LazyTensor]:
    """External tensors -> native ones.

    Args:
        tensors: all external tensors.
        table: from ``key_mappings``.
        shapes: native names -> native shapes.
        where: the file, for error messages.

    Raises:
        ValueError: listing by external name all tensors that are missing, unexpected or of the
            wrong shape.
    """
    empty = {k: LazyTensor(shapes[k], torch.float32, lambda: torch.empty(0)) for k, _, _ in table}
    expected = {name: lazy.shape for name, lazy in to_external(empty, table).items()}
    compare_shapes(expected, {name: lazy.shape for name, lazy in tensors.items()}, where)
    return {
        native: LazyTensor(
            shapes[native],
            tensors[external[0]].dtype,
            _concatenated(tensors, external, shapes[native]),
        )
        for native, external, _ in table
    }


def _concatenated(
    tensors: Mapping[str, LazyTensor], names: tuple[str, ...], shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    if len(names) == 1:
        return lambda: tensors[names[0]].load().reshape(shape)
    return lambda: torch.cat([tensors[name].load() for name in names])


def _rename(key: str, rules: Rules) -> str:
    """The key with the first matching rule applied."""
    for pattern, name in rules:
        key, replaced = re.subn(pattern, name, key)
        if replaced:
            break
    return key


def _prior(key: str, config: Mapping[str, Any]) -> str:
    if match := re.match(r"blocks\.(\d+)\.((res|time|attn)\..*)", key):
        index = int(match[1]) * len(_BLOCK_PARTS) + _BLOCK_PARTS[match[3]]
        return f"blocks.{index}.{_rename(match[2], _BLOCK)}"
    return _rename(key, _PRIOR)


def _u_net(key: str, config: Mapping[str, Any]) -> str:
    """A published level is a flat list: incoming resampler, parts of its blocks, outgoing one."""
    parts = [2 if heads is None else 3 for heads in config["num_heads"]]
    last = len(parts) - 1
    if match := re.match(r"(down|up)\.(\d+)\.semantic_mapper\.(.*)", key):
        index = int(match[2]) + (len(parts) if match[1] == "up" else 0)
        return f"effnet_mappers.{index}.{match[3]}"
    if match := re.match(r"downsample\.(\d+)\.(.*)", key):
        return f"down_blocks.{int(match[1]) + 1}.0.{match[2]}"
    if match := re.match(r"upsample\.(\d+)\.(.*)", key):
        level = last - int(match[1])
        return f"up_blocks.{match[1]}.{config['num_blocks'][level] * parts[level]}.{match[2]}"
    if match := re.match(r"(down|up)\.(\d+)\.blocks\.(\d+)\.((res|time|attn)\..*)", key):
        side, i, j = match[1], int(match[2]), int(match[3])
        first = 1 if side == "down" and i > 0 else 0
        index = first + j * parts[i if side == "down" else last - i] + _BLOCK_PARTS[match[5]]
        return f"{side}_blocks.{i}.{index}.{_rename(match[4], _BLOCK)}"
    return _rename(key, _PAELLA if config["_target_"] == PAELLA else _DIFFNEXT)


def _vqgan(key: str, config: Mapping[str, Any]) -> str:
    levels = config["levels"]
    last = f"down_blocks.{2 * levels - 1}"
    key = re.sub(r"^to_latent\.", f"{last}.0.", re.sub(r"^latent_norm\.", f"{last}.1.", key))
    if match := re.match(r"encoder\.(block|downsample)(\d+)\.(.*)", key):
        index = 2 * int(match[2]) - (match[1] == "downsample")
        return f"down_blocks.{index}.{_rename(match[3], _VQGAN_BLOCK)}"
    if match := re.match(r"decoder\.(\w+)\.(.*)", key):
        blocks = [config["bottleneck_blocks"]] + [1] * (levels - 1)  # coarsest level first
        flat = []
        for level, count in zip(reversed(range(levels)), blocks, strict=True):
            flat += [f"block{level}_{j}" for j in range(count)] + [f"upsample{level}"]
        return f"up_blocks.{1 + flat.index(match[1])}.{_rename(match[2], _VQGAN_BLOCK)}"
    return _rename(key, _VQGAN)


def _compressor(key: str, config: Mapping[str, Any]) -> str:
    return _rename(key, _COMPRESSOR)


def _text(key: str, config: Mapping[str, Any]) -> str:
    return _rename(_rename(key, _TEXT), _TEXT_LAYER)


def _for_diffusers(name: str, target: str) -> tuple[str, ...]:
    """Upstream name -> names in diffusers and transformers, which split query, key and value."""
    if target == VQGAN:
        return (name.replace("vquantizer.codebook.", "vquantizer.embedding."),)
    name = name.replace("attention.attn.out_proj.", "attention.to_out.0.")
    if match := re.fullmatch(r"(.*attention\.)attn\.in_proj_(\w+)", name):
        return tuple(f"{match[1]}to_{which}.{match[2]}" for which in "qkv")
    if match := re.fullmatch(r"(.*self_attn\.)in_proj_(\w+)", name):
        return tuple(f"{match[1]}{which}_proj.{match[2]}" for which in "qkv")
    return (name,)
