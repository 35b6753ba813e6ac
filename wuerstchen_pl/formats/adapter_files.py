"""Adapter files: written in diffusers' layout, read from those that trainers write.

Read are the layouts of diffusers (with ``lora_A`` or the older ``to_q_lora.down``), kohya's flat
names (``lora_unet_blocks_2_attention_to_q.lora_down``) and OneTrainer's dotted ones.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from wuerstchen_pl.adapters.targets import layer_names
from wuerstchen_pl.adapters.weights import AdapterWeights, LowRank, from_tensors, weight_rows
from wuerstchen_pl.checkpointing.finite import check_finite
from wuerstchen_pl.formats.key_map import key_mappings
from wuerstchen_pl.formats.lazy_tensors import in_memory, write_safetensors
from wuerstchen_pl.formats.model import PRIOR
from wuerstchen_pl.formats.registry import resolve_source
from wuerstchen_pl.io.atomic import atomic_write
from wuerstchen_pl.models.prior import Prior

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
_PREFIXES = ("prior.", "lora_prior_unet.", "lora_unet.", "lora_prior_unet_", "lora_unet_", "unet.")
_TEXT = ("text_encoder", "lora_te")
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
    layer: str
    """In diffusers' names, or flat, with ``_`` for ``.``."""
    kind: str


def external_names(layers: Iterable[str]) -> dict[str, str]:
    """Layers of Stage C, such as ``blocks.0.attn.attention.qkv.to_q`` -> their diffusers names."""
    names = {}
    for layer in layers:
        key, third = weight_rows(layer)
        external = key_mappings({"_target_": PRIOR}, [key], "diffusers")[0].external
        names[layer] = external[third or 0].removesuffix(".weight")
    return names


def write_adapter(path: Path, adapter: AdapterWeights, *, base_sha256: str | None = None) -> None:
    """Write an adapter so that diffusers reads it; its scale is part of the tensors.

    Args:
        path: the file to write.
        adapter: of Stage C.
        base_sha256: hash of the weights that it was trained with.
    """
    names = external_names(adapter)
    tensors = {
        f"prior.{names[layer]}.{name}": in_memory(tensor)
        for layer, weights in adapter.items()
        for name, tensor in weights.tensors().items()
    }
    metadata: dict[str, str] = {}
    first = next(iter(adapter.values()))
    if isinstance(first, LowRank):  # diffusers reads no others
        settings = {
            "prior.r": first.rank, "prior.lora_alpha": first.rank, "prior.peft_type": "LORA",
            "prior.use_dora": first.magnitude is not None,
            "prior.target_modules": sorted(names.values()),
        }  # fmt: skip
        metadata[METADATA] = json.dumps(settings, sort_keys=True)
    metadata |= {} if base_sha256 is None else {"base_sha256": base_sha256}
    with atomic_write(path) as temporary:
        write_safetensors(temporary, tensors, metadata)


def read_adapter(path: str | Path, prior: Prior, *, alpha: float | None = None) -> AdapterWeights:
    """Read an adapter of Stage C.

    Args:
        path: the file, or a folder or hub id with ``pytorch_lora_weights.safetensors``.
        prior: the network that it is for.
        alpha: of a file that does not state it; None is the rank.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another network, or has tensors of an unknown kind.
    """
    path = resolve_source(str(path))
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"lora={path} does not exist; use a .safetensors file of an adapter"
        )
    tensors, metadata = _read(file)
    layer_of = {name: layer for layer, name in external_names(layer_names(prior)).items()}
    layer_of |= {name.replace(".", "_"): layer for name, layer in layer_of.items()}
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        entry = _parse(key, file)
        if entry.layer not in layer_of:
            raise ValueError(
                f"{file} has {key}, which is not of this model's Stage C; use an adapter of it"
            )
        by_layer.setdefault(layer_of[entry.layer], {})[entry.kind] = tensor
    if not by_layer:
        raise ValueError(f"{file} has no tensors of an adapter; use another file")
    alpha = alpha if alpha is not None else _stated_alpha(metadata)
    return {layer: _layer(parts, alpha, f"{file}, {layer}") for layer, parts in by_layer.items()}


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    check_finite(tensors, str(file))
    return tensors, metadata


def _parse(key: str, file: Path) -> _Entry:
    """The layer and the kind of a tensor."""
    if key.startswith(_TEXT):
        raise ValueError(
            f"{file} has {key}, an adapter of the text encoder, which is not supported; remove it"
        )
    prefix = next((p for p in _PREFIXES if key.startswith(p)), "")
    name = key.removeprefix(prefix)
    if match := _OLD.fullmatch(name):
        which = "to_out.0" if match["which"] == "to_out" else match["which"]
        return _Entry(f"{match['layer']}.{which}", _OTHER_NAMES[match["kind"]])
    if match := _TENSOR.fullmatch(name):
        return _Entry(match["layer"], _OTHER_NAMES.get(match["kind"], match["kind"]))
    raise ValueError(
        f"{file} has {key}, which is not a tensor of a known adapter; use another file"
    )


def _stated_alpha(metadata: Mapping[str, str]) -> float | None:
    """The alpha of diffusers' header; None if there is none."""
    try:
        stated = json.loads(metadata[METADATA])
        return float(next(v for k, v in stated.items() if k.endswith("lora_alpha")))
    except (LookupError, ValueError, TypeError, AttributeError, StopIteration):
        return None


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
