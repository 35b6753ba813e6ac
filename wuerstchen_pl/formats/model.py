"""A model between format: named parts, each a config and tensors under our names."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from torch import nn

from wuerstchen_pl.checkpointing.load import instantiate_allowed
from wuerstchen_pl.formats.lazy_tensors import LazyTensor

SHIFT = "semantic_shift"
"""The one setting that may be 0."""
SETTINGS = ("semantic_scale", SHIFT, "resolution_multiple", "latent_dim_scale")
PARTS = ("prior_text_encoder", "prior", "text_encoder", "decoder", "vqgan", "compressor")
SCALE = "scale_factor"
"""Stage A's tensor that the other format hold in a config, or nowhere."""


@dataclass
class Part:
    """A network.

    ``config`` has its class as ``_target_`` and its constructor's arguments; ``tensors`` are its
    state dict; ``tokenizer`` is the folder of a text encoder's files, None being open_clip's own.
    """

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    tokenizer: Path | None = None


@dataclass
class Model:
    """A cascade, or some parts of one."""

    parts: dict[str, Part] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)
    """semantic_scale, semantic_shift, resolution_multiple and latent_dim_scale, as of the samplers;
    where one is missing, the published value is meant."""
    source: dict[str, str] | None = None
    """``path`` and ``sha256`` of the run's checkpoint that it was read from."""
    card: str | None = None
    """Its README.md."""


KINDS = {
    "prior": ("prior.Prior",),
    "decoder": ("diffnext.DiffNeXt", "paella.Paella"),
    "vqgan": ("vqgan.VQGAN",),
    "compressor": ("compressor.SemanticCompressor",),
    "text_encoder": ("text.TextEncoder",),
    "prior_text_encoder": ("text.TextEncoder",),
}
"""What a part may be."""
MODELS = "wuerstchen_pl.models."
COUNTS = ("depth", "num_blocks", "bottleneck_blocks", "levels")
"""Arguments that say how many layers there are: at most as many as there are tensors."""


def validate_config(config: Any, part: str, num_tensors: int, where: str) -> dict[str, Any]:
    """An untrusted config, which may build a network of that part's kind and do nothing else.

    Files that it names are forgotten: weights are at hand, a tokenizer lies beside it.

    Raises:
        ValueError: if it would build something else, or more layers than there are tensors.
    """
    if not isinstance(config, dict) or config.get("_target_") not in [
        MODELS + kind for kind in KINDS[part]
    ]:
        target = config.get("_target_") if isinstance(config, dict) else config
        raise ValueError(f"{where} has _target_={target!r}, which is not a {part}; it is not built")
    return _trusted(config, num_tensors, where)


def _trusted(node: Any, num_tensors: int, where: str) -> Any:
    if isinstance(node, list):
        return [_trusted(item, num_tensors, where) for item in node]
    if not isinstance(node, dict):
        return node
    if not str(node.get("_target_", MODELS)).startswith(MODELS):
        raise ValueError(f"{where} has _target_={node['_target_']!r}, which is not a network")
    found = {}
    for key, value in node.items():
        if key.startswith("_") and key != "_target_":
            raise ValueError(f"{where} has the key {key}, which is not read")
        counts = value if isinstance(value, list) else [value]
        if key in COUNTS and any(isinstance(n, int) and n > num_tensors for n in counts):
            raise ValueError(f"{where} has {key}={value}, and there are {num_tensors} tensors")
        forgotten = key in ("weights", "tokenizer")
        found[key] = None if forgotten else _trusted(value, num_tensors, where)
    return found


def validate_settings(settings: Any, where: str) -> dict[str, float]:
    """Untrusted settings, if they are valid for sampling.

    Raises:
        ValueError: for another name, no number, or one that must be above 0 and is not.
    """
    fit = isinstance(settings, dict) and all(
        key in SETTINGS and isinstance(value, int | float) and (value > 0 or key == SHIFT)
        for key, value in settings.items()
    )
    if not fit:
        names = ", ".join(SETTINGS)
        raise ValueError(f"{where} has settings={settings}; use numbers for {names}, above 0")
    return {key: float(value) for key, value in settings.items()}


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the constructor's defaults written out."""
    constructor = get_class(config["_target_"])
    given = inspect.signature(constructor).parameters.values()
    defaults = {p.name: p.default for p in given if p.default is not p.empty}
    return {"_target_": config["_target_"], **defaults, **config}


def build_on_meta(config: dict[str, Any]) -> nn.Module:
    """The network of a config, on the meta device: names and shapes, no memory.

    Raises:
        ValueError: if the config names what is not this package's, or cannot be built.
    """
    try:
        with torch.device("meta"):
            return instantiate_allowed(config)
    except (TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{config.get('_target_')} cannot be built: {reason}") from error


def build_network(part: Part) -> nn.Module:
    """The network of a part with its weights, as they are stored."""
    net = build_on_meta({**part.config, **_tokenizer(part)})
    net.load_state_dict({k: lazy.load() for k, lazy in part.tensors.items()}, assign=True)
    return net.eval().requires_grad_(False)


def _tokenizer(part: Part) -> dict[str, str]:
    return {} if part.tokenizer is None else {"tokenizer": str(part.tokenizer)}


def move_scale_to_config(part: Part) -> Part:
    """A part whose scale of latents, if it has one, is in its config and not in a tensor."""
    if SCALE not in part.tensors:
        return part
    tensors = dict(part.tensors)
    scale, config_scale = tensors.pop(SCALE).load(), part.config[SCALE]
    if (
        config_scale is None or scale.new_tensor(config_scale) != scale
    ):  # 0.3764 is not quite what float32 holds
        config_scale = float(scale)
    return Part({**part.config, SCALE: config_scale}, tensors, part.tokenizer)


def check_tensors(part: Part, where: str) -> None:
    """Refuse tensors that are not exactly those of the network.

    Raises:
        ValueError: listing by name what is missing, unexpected or of another shape.
    """
    wanted = {name: tuple(t.shape) for name, t in build_on_meta(part.config).state_dict().items()}
    compare_shapes(wanted, {name: lazy.shape for name, lazy in part.tensors.items()}, where)


def compare_shapes(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: str
) -> None:
    """Refuse another set of names and shapes than wanted; see ``check``."""
    faults = []
    if missing := sorted(wanted.keys() - found.keys()):
        faults.append(f"missing: {', '.join(missing)}")
    if unexpected := sorted(found.keys() - wanted.keys()):
        faults.append(f"unexpected: {', '.join(unexpected)}")
    shapes = sorted(n for n in wanted.keys() & found.keys() if wanted[n] != found[n])
    if shapes:
        mismatches = (f"{name} is {found[name]} and must be {wanted[name]}" for name in shapes)
        faults.append(f"mis-shaped: {', '.join(mismatches)}")
    if faults:
        raise ValueError(f"{where} does not fit; {'; '.join(faults)}")
