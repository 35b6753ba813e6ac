"""A model between layouts: named parts, each a config and tensors under our names."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from torch import nn

from wuerstchen_pl.checkpoint import build, refuse_foreign
from wuerstchen_pl.layouts.tensors import Lazy

PARTS = ("prior_text_encoder", "prior", "text_encoder", "decoder", "vqgan", "compressor")
SCALE = "scale_factor"
"""Stage A's tensor that the other layouts hold in a config, or nowhere."""


@dataclass
class Part:
    """A network.

    ``config`` has its class as ``_target_`` and its constructor's arguments; ``tensors`` are its
    state dict; ``tokenizer`` is the folder of a text encoder's files, None being open_clip's own.
    """

    config: dict[str, Any]
    tensors: dict[str, Lazy]
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


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the constructor's defaults written out."""
    constructor = get_class(config["_target_"])
    given = inspect.signature(constructor).parameters.values()
    defaults = {p.name: p.default for p in given if p.default is not p.empty}
    return {"_target_": config["_target_"], **defaults, **config}


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The network of a config, on the meta device: names and shapes, no memory.

    Raises:
        ValueError: if the config names what is not this package's, or cannot be built.
    """
    target = config.get("_target_")
    if not str(target).startswith("wuerstchen_pl.models."):
        refuse_foreign(config)
        raise ValueError(f"_target_={target!r} in a config is no network of this package's")
    with torch.device("meta"):
        return build(config)


def network(part: Part) -> nn.Module:
    """The network of a part with its weights, as they are stored."""
    net = skeleton({**part.config, **_tokenizer(part)})
    net.load_state_dict({k: lazy.load() for k, lazy in part.tensors.items()}, assign=True)
    return net.eval().requires_grad_(False)


def _tokenizer(part: Part) -> dict[str, str]:
    return {} if part.tokenizer is None else {"tokenizer": str(part.tokenizer)}


def with_scale(part: Part) -> Part:
    """A part whose scale of latents, if it has one, stands in its config and not in a tensor."""
    if SCALE not in part.tensors:
        return part
    tensors = dict(part.tensors)
    scale, told = tensors.pop(SCALE).load(), part.config[SCALE]
    if told is None or scale.new_tensor(told) != scale:  # 0.3764 is not quite what float32 holds
        told = float(scale)
    return Part({**part.config, SCALE: told}, tensors, part.tokenizer)


def check(part: Part, where: str) -> None:
    """Refuse tensors that are not exactly those of the network.

    Raises:
        ValueError: listing by name what is missing, unexpected or of another shape.
    """
    wanted = {name: tuple(t.shape) for name, t in skeleton(part.config).state_dict().items()}
    compare(wanted, {name: lazy.shape for name, lazy in part.tensors.items()}, where)


def compare(
    wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: str
) -> None:
    """Refuse another set of names and shapes than wanted; as of ``check``."""
    faults = []
    if missing := sorted(wanted.keys() - found.keys()):
        faults.append(f"missing: {', '.join(missing)}")
    if unexpected := sorted(found.keys() - wanted.keys()):
        faults.append(f"unexpected: {', '.join(unexpected)}")
    shapes = sorted(n for n in wanted.keys() & found.keys() if wanted[n] != found[n])
    if shapes:
        told = (f"{name} is {found[name]} and must be {wanted[name]}" for name in shapes)
        faults.append(f"mis-shaped: {', '.join(told)}")
    if faults:
        raise ValueError(f"{where} does not fit; {'; '.join(faults)}")
