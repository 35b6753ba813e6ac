"""The upstream format of dome272/Wuerstchen: a pickle of state dicts for each stage.

Published files do not store arguments. Files that are written here also have the native arguments,
under a key that the upstream code ignores.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wuerstchen_pl.formats import config_map
from wuerstchen_pl.formats.key_map import from_external, key_mappings, to_external
from wuerstchen_pl.formats.lazy_tensors import in_memory, read_pickle
from wuerstchen_pl.formats.model import (
    PAELLA,
    SCALE,
    V1_SCALING,
    Model,
    Part,
    build_on_meta,
    move_scale_to_config,
    validate_config,
    validate_settings,
)

STAGE_A, STAGE_B, STAGE_C = "vqgan_f4_v1_500k.pt", "model_v2_stage_b.pt", "model_v3_stage_c.pt"
STAGE_B_V1, STAGE_C_V1 = "model_stage_b.pt", "model_stage_c.pt"
FILES = (STAGE_A, STAGE_B, STAGE_B_V1, STAGE_C, STAGE_C_V1)
CONFIG = "wuerstchen_pl"
"""Key of the native arguments in pickles that are written here."""
PARTS = {
    "vqgan": ("state_dict",),
    "decoder": ("state_dict",),
    "compressor": ("effnet_state_dict",),
    "prior": ("ema_state_dict", "state_dict"),
}
"""Part -> keys of its state dict in the pickle, preferred ones first."""


def matches(path: Path) -> bool:
    """Whether a path is a pickle, or a folder with some of the published files."""
    return path.suffix in (".pt", ".pth") if path.is_file() else bool(_files(path))


def _files(folder: Path) -> list[Path]:
    return [folder / name for name in FILES if (folder / name).is_file()]


def read(path: Path) -> Model:
    """Read a file, or all published files in a folder.

    Raises:
        ValueError: if a file is damaged, contains more than tensors, or does not match.
    """
    files = [path] if path.is_file() else _files(path)
    names = {file.name for file in files}
    for stage, v2, v1 in (("B", STAGE_B, STAGE_B_V1), ("C", STAGE_C, STAGE_C_V1)):
        if {v2, v1} <= names:
            raise ValueError(
                f"{path} contains two versions of Stage {stage}, {v2} and {v1}; remove one"
            )
    model = Model(settings=dict(V1_SCALING) if STAGE_C_V1 in names else {})
    for file in files:
        content = read_pickle(file)
        parts, configs = _parts_of(content, file), content.get(CONFIG, {})
        if not isinstance(configs, dict):
            raise ValueError(
                f"{file} has {CONFIG}={configs!r}, which is not a dict; use another file"
            )
        for part in parts:
            entry = next(name for name in PARTS[part] if isinstance(content.get(name), dict))
            where = f"{file}, {entry}"
            model.parts[part] = _read_part(content[entry], part, configs.get(part), where)
        model.settings |= validate_settings(configs.get("settings", {}), str(file))
    if {STAGE_B_V1, STAGE_C} <= names and not model.settings:
        raise ValueError(
            f"{path} contains files of both versions, {STAGE_B_V1} and {STAGE_C}; use {STAGE_C_V1} "
            f"or {STAGE_B}"
        )
    return model


def _parts_of(content: dict[str, Any], file: Path) -> list[str]:
    """The parts in a file, detected by a tensor that is unique to each."""
    for part, marker in (
        ("vqgan", "vquantizer.codebook.weight"),
        ("prior", "projection.weight"),
        ("decoder", "embedding.1.weight"),
    ):
        entries = [content[name] for name in PARTS[part] if name in content]
        if any(isinstance(entry, dict) and marker in entry for entry in entries):
            with_compressor = part == "decoder" and "effnet_state_dict" in content
            return [part, "compressor"] if with_compressor else [part]
    raise ValueError(f"{file} has no Stage A, B or C in upstream names; use another file")


def _read_part(
    state: dict[str, Tensor], part: str, config: dict[str, Any] | None, where: str
) -> Part:
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{where} contains more than named tensors; it is not a {part}")
    tensors = {name: in_memory(tensor) for name, tensor in state.items()}
    if config is None:
        stored_shapes = {name: lazy.shape for name, lazy in tensors.items()}
        config = config_map.from_shapes(part, stored_shapes)
    config = validate_config(config, part, len(tensors), where)
    expected = build_on_meta(config, where).state_dict()
    shapes = {name: tuple(t.shape) for name, t in expected.items() if name != SCALE}
    native = from_external(tensors, key_mappings(config, shapes, "upstream"), shapes, where)
    if SCALE in expected:
        native[SCALE] = in_memory(torch.tensor(config[SCALE]))
    return Part(config, native)


def write(model: Model, path: Path) -> None:
    """Write the files of the model's parts; text encoders are not part of this format.

    Raises:
        OSError: if a file cannot be written.
        ValueError: for a Stage B without text, which the upstream code does not support.
    """
    decoder = model.parts.get("decoder")
    if decoder is not None and decoder.config.get("text_dim", 0) is None:
        raise ValueError(
            "the upstream code has no Stage B without text (text_dim=null); use format=native"
        )
    has_tokens = decoder is not None and decoder.config["_target_"] == PAELLA
    is_v1 = has_tokens or V1_SCALING.items() <= model.settings.items()
    for name, parts in (
        (STAGE_A, ("vqgan",)),
        (STAGE_B_V1 if has_tokens else STAGE_B, ("decoder", "compressor")),
        (STAGE_C_V1 if is_v1 else STAGE_C, ("prior",)),
    ):
        content: dict[str, Any] = {}
        configs: dict[str, Any] = {"settings": model.settings}
        for part in parts:
            if part in model.parts:
                configs[part], content[PARTS[part][0]] = _to_upstream(model.parts[part])
        if content:
            path.mkdir(parents=True, exist_ok=True)
            torch.save({**content, CONFIG: configs}, path / name)


def _to_upstream(part: Part) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A part's native arguments, and its tensors in upstream names."""
    part = move_scale_to_config(part)
    table = key_mappings(part.config, part.tensors, "upstream")
    return part.config, {name: t.load() for name, t in to_external(part.tensors, table).items()}
