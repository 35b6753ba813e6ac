"""The names of layers in adapter files: those of diffusers, with a prefix for each network."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from wuerstchen_pl.adapters.targets import layer_names
from wuerstchen_pl.adapters.weights import weight_rows
from wuerstchen_pl.formats.key_map import key_mappings
from wuerstchen_pl.formats.model import DIFFNEXT, PRIOR, TEXT_ENCODER
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.text import TextEncoder

PREFIXES: Mapping[str, tuple[str, ...]] = {
    "decoder": ("decoder.",),
    "prior_text_encoder": ("text_encoder.", "lora_te_", "lora_prior_te.", "lora_prior_te_"),
    "prior": (
        "prior.", "lora_prior_unet.", "lora_unet.", "lora_prior_unet_", "lora_unet_", "unet.", "",
    ),
}  # fmt: skip
"""Part of a model -> the prefixes of its layers, of which the first one is written; the first part
with the prefix of a key is meant.
"""
LABELS = {
    "prior": "Stage C", "decoder": "Stage B", "prior_text_encoder": "Stage C's text encoder",
}  # fmt: skip
"""Part of a model -> its name in messages."""


def external_names(layers: Iterable[str], networks: nn.ModuleDict) -> dict[str, str]:
    """Layers such as ``prior.blocks.0.attn.attention.qkv.to_q`` -> ``blocks.2.attention.to_q``.

    Args:
        layers: names in ``networks``, after ``split_projections``.
        networks: the networks of a model by part.
    """
    names = {}
    for layer in layers:
        part, _, name = layer.partition(".")
        key, third = weight_rows(name)
        external = key_mappings(_config(networks[part]), [key], "diffusers")[0].external
        names[layer] = external[third or 0].removesuffix(".weight")
    return names


def _config(network: nn.Module) -> dict[str, Any]:
    """What ``key_mappings`` reads of a network's config for linear layers."""
    if not isinstance(network, DiffNeXt):
        return {"_target_": TEXT_ENCODER if isinstance(network, TextEncoder) else PRIOR}
    levels: Any = network.down
    attention = [level.blocks[0].attn for level in levels]
    heads = [None if a is None else a.attention.num_heads for a in attention]
    return {"_target_": DIFFNEXT, "num_heads": heads}


def layers_by_name(networks: nn.ModuleDict) -> dict[tuple[str, str], str]:
    """(part, name in a file) -> the layer; names are diffusers', also flat, with ``_`` for ``.``.

    Those of the text encoder are also found without ``text_model.``, as transformers 5 has them.

    Args:
        networks: the networks of a model by part.
    """
    layers: dict[tuple[str, str], str] = {}
    for layer, name in external_names(layer_names(networks), networks).items():
        part = layer.partition(".")[0]
        for dotted in (name, name.removeprefix("text_model.")):
            layers |= {(part, dotted): layer, (part, dotted.replace(".", "_")): layer}
    return layers
