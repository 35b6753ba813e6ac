"""A model independent of its format: named parts, each a config and native tensors."""

import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from torch import nn

from wuerstchen_pl.checkpointing.allowed import NETWORK_TARGETS, instantiate_allowed
from wuerstchen_pl.formats.lazy_tensors import LazyTensor
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.models.meta import is_building_on_meta, on_meta
from wuerstchen_pl.models.prior import MAX_STUDENT_STEPS
from wuerstchen_pl.plural import plural
from wuerstchen_pl.signatures import check_objects

SHIFT = "semantic_shift"
"""The only setting that may be 0 or negative."""
DECODER_SETTING = "latent_dim_scale"
"""The only setting that is Stage B's, not Stage C's."""
STUDENT = "student_steps"
"""Setting of a distilled prior; others lack it. See ``stages.distillation``."""
SETTINGS = ("semantic_scale", SHIFT, "resolution_multiple", DECODER_SETTING, "image_size", STUDENT)
V1_SCALING = {"semantic_scale": 1.0, SHIFT: 0.0}
"""Version 1's prior works on the compressor's latents as they are."""
PARTS = ("prior_text_encoder", "prior", "text_encoder", "decoder", "vqgan", "compressor")
"""The networks of a cascade; a model may also have a ``controlnet``."""
SCALE = "scale_factor"
"""Stage A's tensor that other formats store in a config, or not at all."""


@dataclass
class Part:
    """A network.

    ``config`` has the class as ``_target_`` and the constructor's arguments; ``tensors`` is the
    state dict; ``tokenizer`` is the folder of a text encoder's tokenizer, None for open_clip's.
    """

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    tokenizer: Path | None = None
    network: nn.Module | None = field(default=None, repr=False, compare=False)
    """The network with these tensors, if it was built to read them."""


@dataclass
class Model:
    """A cascade, or some of its parts."""

    parts: dict[str, Part] = field(default_factory=dict)
    settings: dict[str, float] = field(default_factory=dict)
    """semantic_scale, semantic_shift, resolution_multiple and latent_dim_scale of the pipeline, and
    the image_size that it was trained for; a missing one has its published value. student_steps of
    a distilled prior."""
    source: Source | None = None
    """The checkpoint that the model was read from."""
    card: str | None = None
    """The model card, README.md."""


PRIOR = "wuerstchen_pl.models.prior.Prior"
DIFFNEXT = "wuerstchen_pl.models.diffnext.DiffNeXt"
PAELLA = "wuerstchen_pl.models.paella.Paella"
VQGAN = "wuerstchen_pl.models.vqgan.VQGAN"
CONTROLNET = "wuerstchen_pl.models.controlnet.ControlNet"
COMPRESSOR = "wuerstchen_pl.models.compressor.SemanticCompressor"
EFFICIENTNET = "wuerstchen_pl.models.compressor.EfficientNet"
TEXT_ENCODER = "wuerstchen_pl.models.text.TextEncoder"
PART_TARGETS = {
    "prior": (PRIOR,),
    "decoder": (DIFFNEXT, PAELLA),
    "vqgan": (VQGAN,),
    "compressor": (COMPRESSOR,),
    "text_encoder": (TEXT_ENCODER,),
    "prior_text_encoder": (TEXT_ENCODER,),
    "controlnet": (CONTROLNET,),
}
"""Part -> its possible ``_target_``."""
COUNTS = ("depth", "num_blocks", "bottleneck_blocks", "levels")
"""Arguments that count layers, which cannot exceed the number of tensors."""


def validate_config(config: Any, part: str, num_tensors: int, where: str) -> dict[str, Any]:
    """Check an untrusted config, which may only build a network of the part's kind.

    File paths in it are set to None: weights and tokenizer are read from the model's folder.

    Raises:
        ValueError: if it would build something else, or more layers than there are tensors.
    """
    if not isinstance(config, dict) or config.get("_target_") not in PART_TARGETS[part]:
        target = config.get("_target_") if isinstance(config, dict) else config
        raise ValueError(
            f"{where} has _target_={target!r}, which is not a {part}; use another file"
        )
    with contents_of(where):
        sanitized = _sanitized(config, num_tensors, where)
        check_objects(sanitized)
    return sanitized


def _sanitized(node: Any, num_tensors: int, where: str) -> Any:
    if isinstance(node, list):
        return [_sanitized(item, num_tensors, where) for item in node]
    if not isinstance(node, dict):
        return node
    if "_target_" in node and node["_target_"] not in NETWORK_TARGETS:
        raise ValueError(f"{where} has _target_={node['_target_']!r}, which is not a network")
    sanitized = {}
    for key, value in node.items():
        if key.startswith("_") and key != "_target_":
            raise ValueError(f"{where} has the key {key}, which is not allowed; remove it")
        counts = value if isinstance(value, list) else [value]
        if key in COUNTS and any(isinstance(n, int) and n > num_tensors for n in counts):
            raise ValueError(
                f"{where} has {key}={value}, but the file has only {plural(num_tensors, 'tensor')}"
            )
        is_path = key in ("weights", "tokenizer")
        sanitized[key] = None if is_path else _sanitized(value, num_tensors, where)
    return sanitized


def validate_settings(settings: Any, where: str) -> dict[str, float]:
    """Check untrusted settings and convert them to float.

    Raises:
        ValueError: for an unknown name, a value that is not a number, or one that is out of range.
    """
    valid = isinstance(settings, dict) and all(
        key in SETTINGS
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (value > 0 or key == SHIFT)
        for key, value in settings.items()
    )
    if not valid:
        positive = ", ".join(key for key in SETTINGS if key != SHIFT)
        raise ValueError(
            f"{where} has settings={settings}; use positive numbers for {positive}, and any number "
            f"for {SHIFT}"
        )
    if (steps := settings.get(STUDENT, 1)) not in range(1, MAX_STUDENT_STEPS + 1):
        raise ValueError(
            f"{where} has {STUDENT}={steps}; use a whole number from 1 to {MAX_STUDENT_STEPS}"
        )
    return {key: float(value) for key, value in settings.items()}


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the constructor's defaults filled in."""
    constructor = get_class(config["_target_"])
    parameters = inspect.signature(constructor).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {"_target_": config["_target_"], **defaults, **config}


def build_on_meta(config: dict[str, Any], where: str | None = None, key: str = "") -> nn.Module:
    """Build the network of a config on the meta device: names and shapes without memory.

    Args:
        config: a checked config; see ``validate_config``.
        where: the file it was read from, for error messages.
        key: of ``config`` in that file, likewise.

    Raises:
        ValueError: if the config names a class outside this package, or cannot be built.
    """
    with contents_of(where or config["_target_"]), on_meta():
        return instantiate_allowed(config, key)


def build_network(part: Part) -> nn.Module:
    """The network of a part with its weights, in their stored dtype; built unless it exists.

    Within ``on_meta`` no weights are read.
    """
    if part.network is not None:
        return part.network.eval().requires_grad_(False)
    net = build_on_meta({**part.config, **_tokenizer(part)})
    if not is_building_on_meta():
        net.load_state_dict({k: lazy.load() for k, lazy in part.tensors.items()}, assign=True)
    return net.eval().requires_grad_(False)


def _tokenizer(part: Part) -> dict[str, str]:
    return {} if part.tokenizer is None else {"tokenizer": str(part.tokenizer)}


def move_scale_to_config(part: Part) -> Part:
    """A part with its latent scale, if it has one, in its config instead of a tensor."""
    if SCALE not in part.tensors:
        return part
    tensors = dict(part.tensors)
    scale, config_scale = tensors.pop(SCALE).load(), part.config[SCALE]
    # compared in the tensor's dtype: 0.3764 is not exact in float32
    if config_scale is None or scale.new_tensor(config_scale) != scale:
        config_scale = float(scale)
    return Part({**part.config, SCALE: config_scale}, tensors, part.tokenizer)


def check_tensors(part: Part, where: str, config_file: Path | None = None) -> None:
    """Check that a part has exactly the tensors of its network.

    Args:
        part: the part.
        where: where its tensors were read from, for error messages.
        config_file: the file of its config, if that was read from another one.

    Raises:
        ValueError: listing tensors that are missing, unexpected or of the wrong shape.
    """
    network = build_on_meta(part.config, str(config_file or where))
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    where += f" with {config_file.name}" if config_file else ""
    compare_shapes(expected, {name: lazy.shape for name, lazy in part.tensors.items()}, where)


def compare_shapes(
    expected: dict[str, tuple[int, ...]], actual: dict[str, tuple[int, ...]], where: str
) -> None:
    """Check that names and shapes are as expected; see ``check_tensors``."""
    wrong = sorted(n for n in expected.keys() & actual.keys() if expected[n] != actual[n])
    differences = {
        "missing": sorted(expected.keys() - actual.keys()),
        "unexpected": sorted(actual.keys() - expected.keys()),
        "wrong shape": [f"{name} is {actual[name]}, expected {expected[name]}" for name in wrong],
    }
    errors = [f"{what}: {_some(names)}" for what, names in differences.items() if names]
    if errors:
        raise ValueError(f"{where} does not match the expected tensors; {'; '.join(errors)}")


def _some(names: list[str], number: int = 5) -> str:
    more = len(names) - number
    return ", ".join(names[:number]) + (f" and {more} more" if more > 0 else "")
