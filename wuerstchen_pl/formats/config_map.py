"""Constructor arguments: to and from diffusers' and transformers' ``config.json``, and from shapes.

Upstream files do not store arguments: ``from_shapes`` infers them from the shapes of the tensors.
The number of heads cannot be inferred; it follows from the published head widths.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from wuerstchen_pl.formats.model import (
    COMPRESSOR,
    DIFFNEXT,
    EFFICIENTNET,
    PAELLA,
    PRIOR,
    TEXT_ENCODER,
    VQGAN,
)

Config = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

SCALE_FACTOR = 0.3764
"""Latent scale of the published Stage A, a constant in the upstream code."""
HEAD_WIDTH = 64
"""Channels per attention head in v2's networks and v1's Stage C."""
PAELLA_HEAD_WIDTH = 80
"""Channels per attention head in v1's Stage B."""


class Scheme(NamedTuple):
    """An external network: class name, native -> external arguments, and required fixed values."""

    class_name: str
    names: dict[str, str]
    fixed: Config


_PRIOR = Scheme(
    "WuerstchenPrior",
    {
        "latent_channels": "c_in", "width": "c", "text_dim": "c_cond", "time_dim": "c_r",
        "depth": "depth", "num_heads": "nhead", "dropout": "dropout",
    },
    {},
)  # fmt: skip
_DIFFNEXT = Scheme(
    "WuerstchenDiffNeXt",
    {
        "latent_channels": "c_in", "semantic_channels": "effnet_embd", "patch_size": "patch_size",
        "widths": "c_hidden", "num_blocks": "blocks", "num_heads": "nhead",
        "inject_semantic": "inject_effnet", "cond_dim": "c_cond", "text_dim": "clip_embd",
        "time_dim": "c_r", "dropout": "dropout",
    },
    {"kernel_size": 3},
)  # fmt: skip
_VQGAN = Scheme(
    "PaellaVQModel",
    {
        "levels": "levels", "bottleneck_blocks": "bottleneck_blocks", "width": "embed_dim",
        "latent_channels": "latent_channels", "codebook_size": "num_vq_embeddings",
        "scale_factor": "scale_factor",
    },
    {"in_channels": 3, "out_channels": 3, "up_down_scale_factor": 2},
)  # fmt: skip
_TEXT = Scheme(
    "CLIPTextModel",
    {
        "width": "hidden_size", "depth": "num_hidden_layers", "num_heads": "num_attention_heads",
        "context_length": "max_position_embeddings", "vocab_size": "vocab_size",
        "activation": "hidden_act",
    },
    {"layer_norm_eps": 1e-5, "model_type": "clip_text_model"},
)  # fmt: skip
SCHEMES = {PRIOR: _PRIOR, DIFFNEXT: _DIFFNEXT, VQGAN: _VQGAN, TEXT_ENCODER: _TEXT}
"""Native ``_target_`` -> external network."""


def from_diffusers(target: str, config: Mapping[str, Any], where: str) -> Config:
    """``config.json`` -> native arguments, with ``_target_``.

    Args:
        target: native ``_target_``, a key of ``SCHEMES``.
        config: contents of ``config.json``.
        where: the file, for error messages.

    Raises:
        ValueError: naming a key that is missing, or whose value is not supported.
    """
    scheme = SCHEMES[target]
    for key, value in {"_class_name": scheme.class_name, **scheme.fixed}.items():
        if config.get(key, value) != value:
            raise ValueError(f"{where} has {key}={config[key]!r}; only {value!r} is supported")
    if config.get("hidden_act", "gelu") not in ("gelu", "quick_gelu"):
        raise ValueError(
            f"{where} has hidden_act={config['hidden_act']!r}; only gelu and quick_gelu are "
            "supported"
        )
    if missing := sorted(name for name in scheme.names.values() if name not in config):
        raise ValueError(f"{where} lacks {', '.join(missing)}; it is not a {scheme.class_name}")
    arguments = {native: config[name] for native, name in scheme.names.items()}
    if any(value is None for value in arguments.values()):
        null = next(name for native, name in scheme.names.items() if arguments[native] is None)
        raise ValueError(f"{where} has {null}=null; set its value")
    if target == DIFFNEXT:
        arguments |= _from_diffnext(config, where)
    if target == TEXT_ENCODER:
        arguments["mlp_ratio"] = config["intermediate_size"] / config["hidden_size"]
    return {"_target_": target, **arguments}


def _from_diffnext(config: Mapping[str, Any], where: str) -> Config:
    heads = [n if n > 0 else None for n in config["nhead"]]
    supported = ["CT" if n is None else "CTA" for n in heads]
    # Published configs have nhead=-1 without attention; a "CT" level ignores its nhead.
    heads = [None if kind == "CT" else n for kind, n in zip(config["level_config"], heads)]  # noqa: B905
    if list(config["level_config"]) != ["CT" if n is None else "CTA" for n in heads]:
        raise ValueError(
            f"{where} has level_config={list(config['level_config'])}; only {supported} is "
            "supported"
        )
    if config.get("c_out", config["c_in"]) != config["c_in"]:
        raise ValueError(
            f"{where} has c_out={config['c_out']}; only {config['c_in']}, as c_in, is supported"
        )
    dropout = config["dropout"]
    if isinstance(dropout, list):  # one per level; only used in training
        dropout = max(dropout)
    return {"num_heads": heads, "dropout": dropout}


def to_diffusers(config: Config) -> Config:
    """Native arguments -> ``config.json``.

    Raises:
        ValueError: if diffusers has no such network.
    """
    target = config["_target_"]
    if target not in SCHEMES:
        raise ValueError(f"diffusers has no {target}; use format=native")
    if config.get("text_dim", 0) is None:
        raise ValueError("diffusers has no Stage B without text (text_dim=null); use format=native")
    scheme = SCHEMES[target]
    external = {name: config[native] for native, name in scheme.names.items()} | scheme.fixed
    if target == TEXT_ENCODER:
        return external | {
            "architectures": [scheme.class_name],
            "intermediate_size": round(config["width"] * config["mlp_ratio"]),
            # only used for pooling and in training, but required by transformers
            "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1,
            "projection_dim": config["width"], "initializer_factor": 1.0,
        }  # fmt: skip
    if target == DIFFNEXT:
        external |= {
            "nhead": [-1 if n is None else n for n in config["num_heads"]],
            "level_config": ["CT" if n is None else "CTA" for n in config["num_heads"]],
            "c_out": config["latent_channels"],
        }
    return {"_class_name": scheme.class_name, "_diffusers_version": "0.21.0", **external}


def from_shapes(part: str, shapes: Shapes) -> Config:
    """The arguments of a network in the upstream format, inferred from its tensors' shapes.

    Raises:
        ValueError: if a tensor of the network is missing.
    """
    finder = {"prior": _prior, "decoder": _decoder, "vqgan": _vqgan, "compressor": _compressor}
    try:
        return finder[part](shapes)
    except KeyError as error:
        raise ValueError(f"these are not the weights of a {part}: {error} is missing") from None


def _prior(shapes: Shapes) -> Config:
    width, latent_channels = shapes["projection.weight"][:2]
    return {
        "_target_": PRIOR,
        "latent_channels": latent_channels,
        "width": width,
        "depth": _count(shapes, r"blocks\.(\d+)\.") // 3,
        "num_heads": width // HEAD_WIDTH,
        "text_dim": shapes["cond_mapper.0.weight"][1],
        "time_dim": shapes["blocks.1.mapper.weight"][1],
        "dropout": 0.1,
    }


def _decoder(shapes: Shapes) -> Config:
    paella = "out_mapper.1.weight" in shapes
    levels = _count(shapes, r"down_blocks\.(\d+)\.")
    head_width = PAELLA_HEAD_WIDTH if paella else HEAD_WIDTH
    widths, blocks, heads = [], [], []
    for i in range(levels):
        level = {key: shape for key, shape in shapes.items() if key.startswith(f"down_blocks.{i}.")}
        widths.append(next(s[0] for k, s in level.items() if k.endswith("depthwise.weight")))
        blocks.append(sum(key.endswith("depthwise.weight") for key in level))
        has_attention = any(key.endswith("kv_mapper.1.weight") for key in level)
        heads.append(widths[-1] // head_width if has_attention else None)
    shared: Config = {
        "widths": widths, "num_blocks": blocks, "num_heads": heads, "patch_size": PATCH_SIZE,
        "time_dim": shapes["down_blocks.0.1.mapper.weight"][1], "dropout": 0.1,
    }  # fmt: skip
    if paella:
        codes, token_dim = shapes["in_mapper.0.weight"]
        cond_dim, text_dim = shapes["byt5_mapper.weight"]
        channels = shapes["effnet_mapper.weight"][1]
        return {
            "_target_": PAELLA, "codebook_size": codes, "token_dim": token_dim,
            "semantic_channels": channels, "cond_dim": cond_dim, "text_dim": text_dim, **shared,
        }  # fmt: skip
    cond_dim, text_dim = shapes["clip_mapper.weight"]
    mapped = [f"effnet_mappers.{i}.weight" in shapes for i in range(levels)]
    mapper = shapes[f"effnet_mappers.{mapped.index(True)}.weight"]
    return {
        "_target_": DIFFNEXT, "cond_dim": cond_dim, "text_dim": text_dim,
        "latent_channels": shapes["embedding.1.weight"][1] // PATCH_SIZE**2,
        "semantic_channels": mapper[1], "inject_semantic": mapped, **shared,
    }  # fmt: skip


PATCH_SIZE = 2


def _vqgan(shapes: Shapes) -> Config:
    levels = _count(shapes, r"down_blocks\.(\d+)\.") // 2
    codes, channels = shapes["vquantizer.codebook.weight"]
    blocks = sum(bool(re.fullmatch(r"up_blocks\.\d+\.gammas", key)) for key in shapes)
    return {
        "_target_": VQGAN,
        "levels": levels,
        "bottleneck_blocks": blocks - (levels - 1),
        "width": shapes["up_blocks.0.0.weight"][0],
        "latent_channels": channels,
        "codebook_size": codes,
        "scale_factor": SCALE_FACTOR,
    }


def _compressor(shapes: Shapes) -> Config:
    stages = _count(shapes, r"backbone\.(\d+)\.")
    return {
        "_target_": COMPRESSOR,
        "latent_channels": shapes["mapper.0.weight"][0],
        "resize": 0.75,
        "backbone": {
            "_target_": EFFICIENTNET,
            "size": "l" if stages > EFFICIENTNET_S_STAGES else "s",
            "weights": None,
        },
    }


EFFICIENTNET_S_STAGES = 8


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest index in the keys that match."""
    indices = [int(match[1]) for key in shapes if (match := re.match(pattern, key))]
    if not indices:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "N"))
    return 1 + max(indices)
