"""A ControlNet as one safetensors file: its header has its config, and the hash of its base."""

import json
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open

from wuerstchen_pl.formats.hub import resolve_file
from wuerstchen_pl.formats.lazy_tensors import checked, read_safetensors, write_safetensors
from wuerstchen_pl.formats.model import Part, build_network, check_tensors, validate_config
from wuerstchen_pl.io.atomic import atomic_write
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.models.controlnet import ControlNet
from wuerstchen_pl.models.fingerprint import weights_fingerprint
from wuerstchen_pl.models.prior import Prior

FILE = "controlnet.safetensors"
CONFIG, BASE = "controlnet", "base_bfloat16_sha256"


def base_fingerprint(prior: Prior) -> str:
    """A hash of a prior's weights that does not depend on whether they are in bfloat16."""
    return weights_fingerprint([prior], torch.bfloat16)


def write_controlnet(path: Path, part: Part, prior: Prior) -> None:
    """Write a ControlNet.

    Args:
        path: the file to write.
        part: its config, which says what its control images show, and its tensors.
        prior: the prior that it was trained with.
    """
    header = {CONFIG: json.dumps(part.config), BASE: base_fingerprint(prior)}
    with atomic_write(path) as temporary:
        write_safetensors(temporary, part.tensors, header)


def read_controlnet(path: str | Path, prior: Prior, *, allow_mismatch: bool = False) -> ControlNet:
    """Read a ControlNet for a prior.

    Args:
        path: the file, or a folder or hub id with ``controlnet.safetensors``.
        prior: the network that it is for.
        allow_mismatch: accept a prior with other weights of the same sizes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or for another prior.
    """
    use = "a file that was exported with format=controlnet"
    file = resolve_file(path, FILE, key="controlnet", use=use)
    tensors = {k: checked(lazy, k, str(file)) for k, lazy in read_safetensors(file).items()}
    with contents_of(file), safe_open(file, "pt") as content:
        header = content.metadata() or {}
        config, base = json.loads(header[CONFIG]), header[BASE]
    part = Part(validate_config(config, "controlnet", len(tensors), str(file)), tensors)
    check_tensors(part, str(file))
    controlnet = cast(ControlNet, build_network(part))
    controlnet.arguments = part.config
    with contents_of(file):
        controlnet.check_prior(prior)
    if not allow_mismatch and base != (actual := base_fingerprint(prior)):
        raise ValueError(
            f"controlnet={path} was trained beside a prior of sha256 {base[:12]}, but this one has "
            f"{actual[:12]}; use its own base model without adapters, or set allow_mismatch=true"
        )
    return controlnet
