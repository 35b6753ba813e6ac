"""Adapter files: written in diffusers' layout, read from those that trainers write.

Read are the layouts of diffusers (with ``lora_A`` or the older ``to_q_lora.down``), kohya's flat
names (``lora_unet_blocks_2_attention_to_q.lora_down``) and OneTrainer's dotted ones.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from wuerstchen_pl.adapters.weights import AdapterWeights, LayerAdapter, LowRank, from_tensors
from wuerstchen_pl.formats.adapter_names import LABELS, PREFIXES, external_names, layers_by_name
from wuerstchen_pl.formats.hub import resolve_file
from wuerstchen_pl.formats.lazy_tensors import (
    LazyTensor,
    in_memory,
    read_small_file,
    write_safetensors,
)
from wuerstchen_pl.io.atomic import atomic_write

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
_OTHER_NAMES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "down.weight": "lora_A.weight",
    "up.weight": "lora_B.weight",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "dora_scale": "lora_magnitude_vector",
}
"""Names of tensors elsewhere -> peft's."""
_KINDS = "|".join(
    [
        r"lora_[AB]\.weight", r"lora_(?:up|down)\.weight", r"lora_magnitude_vector(?:\.weight)?",
        r"dora_scale", r"hada_w[12]_[ab]", r"lokr_w[12](?:_[ab])?", "alpha",
    ]
)  # fmt: skip
_TENSOR = re.compile(rf"(?P<layer>.+)\.(?P<kind>{_KINDS})")
_OLD = re.compile(
    r"(?P<layer>.+)\.processor\.(?P<which>to_\w+)_lora\.(?P<kind>(?:up|down)\.weight)"
)


class _Entry(NamedTuple):
    part: str
    prefix: str
    layer: str
    """In diffusers' names, or flat, with ``_`` for ``.``."""
    kind: str


def split_weight(text: str) -> tuple[str, float]:
    """``style.safetensors:0.8`` -> the path and the weight, which is 1 if there is none."""
    path, separator, weight = text.rpartition(":")
    is_weight = bool(separator) and re.fullmatch(r"-?\d*\.?\d+", weight) is not None
    return (path, float(weight)) if is_weight else (text, 1.0)


def write_adapter(
    path: Path,
    adapter: AdapterWeights,
    networks: nn.ModuleDict,
    *,
    base_sha256: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter so that diffusers reads it; its scale is part of the tensors.

    Args:
        path: the file to write.
        adapter: its layers are those of ``networks``.
        networks: the networks that it is for, by part of a model.
        base_sha256: hashes of the weights that it was trained with, by part.
    """
    names = external_names(adapter, networks)
    tensors: dict[str, LazyTensor] = {}
    settings: dict[str, Any] = {}
    for part in networks:
        prefix = PREFIXES[part][0]
        layers = {names[layer]: w for layer, w in adapter.items() if layer.startswith(f"{part}.")}
        tensors |= {
            f"{prefix}{name}.{kind}": in_memory(tensor)
            for name, weights in layers.items()
            for kind, tensor in weights.tensors().items()
        }
        settings |= {f"{prefix}{key}": value for key, value in _settings(layers).items()}
    metadata = {METADATA: json.dumps(settings, sort_keys=True)} if settings else {}
    metadata |= {f"{part}.base_sha256": sha256 for part, sha256 in (base_sha256 or {}).items()}
    with atomic_write(path) as temporary:
        write_safetensors(temporary, tensors, metadata)


def _settings(layers: Mapping[str, LayerAdapter]) -> dict[str, Any]:
    """What diffusers' header states about the layers of a network."""
    low_rank = {name: layer for name, layer in layers.items() if isinstance(layer, LowRank)}
    if not low_rank:  # diffusers reads no others
        return {}
    first = next(iter(low_rank.values()))
    pattern = {name: layer.rank for name, layer in low_rank.items() if layer.rank != first.rank}
    return {
        "r": first.rank, "rank_pattern": pattern,
        "lora_alpha": first.rank, "alpha_pattern": pattern,
        "peft_type": "LORA", "use_dora": first.magnitude is not None,
        "target_modules": sorted(low_rank),
    }  # fmt: skip


def read_adapter(
    path: str | Path, networks: nn.ModuleDict, *, alpha: float | None = None
) -> AdapterWeights:
    """Read an adapter.

    Args:
        path: the file, or a folder or hub id with ``pytorch_lora_weights.safetensors``.
        networks: the networks that it is for, by part of a model.
        alpha: of a file that does not state it; None is the rank.

    Returns:
        Names of layers in ``networks``, such as ``prior.blocks.0.attn.attention.qkv.to_q``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another network, or has tensors of an unknown kind.
    """
    file = resolve_file(path, FILE, key="lora", use="a .safetensors file of an adapter")
    tensors, metadata = read_small_file(file)
    names, header = layers_by_name(networks), _header(metadata)
    by_layer: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float | None] = {}
    for key, tensor in tensors.items():
        entry = _parse(key, file)
        label = LABELS[entry.part]
        if entry.part not in networks:
            raise ValueError(
                f"{file} has {key}, an adapter of {label}, which the model lacks; use another model"
            )
        if (layer := names.get((entry.part, entry.layer))) is None:
            raise ValueError(
                f"{file} has {key}, which is not of this model's {label}; use an adapter of it"
            )
        by_layer.setdefault(layer, {})[entry.kind] = tensor
        alphas[layer] = _stated_alpha(header, entry) if alpha is None else alpha
    if not by_layer:
        raise ValueError(f"{file} has no tensors of an adapter; use another file")
    return {
        layer: _layer(kinds, alphas[layer], f"{file}, {layer}") for layer, kinds in by_layer.items()
    }


def _parse(key: str, file: Path) -> _Entry:
    """The network, the layer and the kind of a tensor."""
    part, prefix = next(
        (part, prefix)
        for part, prefixes in PREFIXES.items()
        for prefix in prefixes
        if key.startswith(prefix)
    )
    name = key.removeprefix(prefix)
    if match := _OLD.fullmatch(name):
        which = "to_out.0" if match["which"] == "to_out" else match["which"]
        return _Entry(part, prefix, f"{match['layer']}.{which}", _OTHER_NAMES[match["kind"]])
    if match := _TENSOR.fullmatch(name):
        return _Entry(part, prefix, match["layer"], _OTHER_NAMES.get(match["kind"], match["kind"]))
    raise ValueError(
        f"{file} has {key}, which is not a tensor of a known adapter; use another file"
    )


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Diffusers' header; empty if there is none."""
    with suppress(ValueError):
        header = json.loads(metadata.get(METADATA, "{}"))
        return header if isinstance(header, dict) else {}
    return {}


def _stated_alpha(header: Mapping[str, Any], entry: _Entry) -> float | None:
    """The alpha of a layer in diffusers' header; None if there is none."""
    alpha: Any = header.get(f"{entry.prefix}lora_alpha")
    pattern = header.get(f"{entry.prefix}alpha_pattern")
    for name, value in pattern.items() if isinstance(pattern, dict) else ():
        if f".{entry.layer}".endswith(f".{name.removeprefix('^')}"):
            alpha = value
    return float(alpha) if isinstance(alpha, int | float) else None


def _layer(tensors: dict[str, Tensor], alpha: float | None, where: str) -> Any:
    stated = tensors.pop("alpha", None)
    alpha = float(stated) if stated is not None else alpha
    try:
        magnitude = tensors.get("lora_magnitude_vector")
        if magnitude is not None and magnitude.ndim > 1 and magnitude.shape[0] == 1:
            raise ValueError(
                "its DoRA has a magnitude per input, and only those per output are supported"
            )
        if magnitude is not None:
            tensors["lora_magnitude_vector"] = magnitude.flatten()
        layer = from_tensors(tensors)
        scale = 1.0 if alpha is None else alpha / layer.rank
        return from_tensors(tensors, scale=scale)
    except ValueError as error:
        raise ValueError(f"{where}: {error}; use another file") from error
