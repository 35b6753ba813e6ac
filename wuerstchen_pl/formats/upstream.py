"""The authors' format (dome272/Wuerstchen): a pickle of state dicts for each stage.

Theirs hold no arguments; those that we write also hold ours, where the authors' code does not look.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wuerstchen_pl.formats import config_map
from wuerstchen_pl.formats.key_map import from_upstream, key_mappings, to_upstream
from wuerstchen_pl.formats.lazy_tensors import in_memory, read_pickle
from wuerstchen_pl.formats.model import (
    SCALE,
    Model,
    Part,
    build_on_meta,
    move_scale_to_config,
    validate_config,
    validate_settings,
)

STAGE_A, STAGE_B, STAGE_B_V1, STAGE_C = (
    "vqgan_f4_v1_500k.pt", "model_v2_stage_b.pt", "model_stage_b.pt", "model_v3_stage_c.pt",
)  # fmt: skip
CONFIG = "wuerstchen_pl"
"""Entry of the pickles that we write, with the parts' arguments."""
PARTS = {
    "vqgan": ("state_dict",),
    "decoder": ("state_dict",),
    "compressor": ("effnet_state_dict",),
    "prior": ("ema_state_dict", "state_dict"),
}
"""Parts, and the entries that may hold them, best first."""


def matches(path: Path) -> bool:
    """Whether a path is one of these files, or a folder with some."""
    return path.suffix in (".pt", ".pth") if path.is_file() else bool(_files(path))


def _files(folder: Path) -> list[Path]:
    return [folder / n for n in (STAGE_A, STAGE_B, STAGE_B_V1, STAGE_C) if (folder / n).is_file()]


def read(path: Path) -> Model:
    """The parts of a file, or of those in a folder.

    Raises:
        ValueError: if a file is damaged, wants to run code, or does not fit.
    """
    if path.is_dir() and {STAGE_B, STAGE_B_V1} <= {file.name for file in _files(path)}:
        raise ValueError(
            f"{path} holds both {STAGE_B} and {STAGE_B_V1}, of two versions; leave one there"
        )
    model = Model()
    for file in [path] if path.is_file() else _files(path):
        content = read_pickle(file)
        parts, configs = _parts_of(content, file), content.get(CONFIG, {})
        if not isinstance(configs, dict):
            raise ValueError(f"{file} has {CONFIG}={configs!r}, which are not arguments")
        for part in parts:
            entry = next(name for name in PARTS[part] if isinstance(content.get(name), dict))
            where = f"{file}, {entry}"
            model.parts[part] = _read_part(content[entry], part, configs.get(part), where)
        model.settings |= validate_settings(configs.get("settings", {}), str(file))
    return model


def _parts_of(content: dict[str, Any], file: Path) -> list[str]:
    """Which parts the entries of a file are, detected by a tensor that only they have."""
    for part, sign in (
        ("vqgan", "vquantizer.codebook.weight"),
        ("prior", "projection.weight"),
        ("decoder", "embedding.1.weight"),
    ):
        entries = [content[name] for name in PARTS[part] if name in content]
        if any(isinstance(entry, dict) and sign in entry for entry in entries):
            with_compressor = part == "decoder" and "effnet_state_dict" in content
            return [part, "compressor"] if with_compressor else [part]
    raise ValueError(f"{file} holds none of Stage A, B and C under the authors' names")


def _read_part(
    state: dict[str, Tensor], part: str, config: dict[str, Any] | None, where: str
) -> Part:
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{where} holds more than named tensors; it is not a {part}")
    tensors = {name: in_memory(tensor) for name, tensor in state.items()}
    if config is None:
        found = {name: lazy.shape for name, lazy in tensors.items()}
        config = config_map.from_shapes(part, found)
    config = validate_config(config, part, len(tensors), where)
    expected = build_on_meta(config).state_dict()
    shapes = {name: tuple(t.shape) for name, t in expected.items() if name != SCALE}
    ours = from_upstream(tensors, key_mappings(config, shapes, "upstream"), shapes, where)
    if SCALE in expected:
        ours[SCALE] = in_memory(torch.tensor(config[SCALE]))
    return Part(config, ours)


def write(model: Model, path: Path) -> None:
    """Write the files of those parts that there are; text encoders have none.

    Raises:
        OSError: if they cannot be written.
        ValueError: for a Stage B without text, which the authors' code has not.
    """
    decoder = model.parts.get("decoder")
    if decoder is not None and decoder.config.get("text_dim", 0) is None:
        raise ValueError(
            "the authors' code has no Stage B without text (text_dim=null); keep format=native"
        )
    is_v1 = decoder is not None and decoder.config["_target_"].endswith("Paella")
    for name, parts in (
        (STAGE_A, ("vqgan",)),
        (STAGE_B_V1 if is_v1 else STAGE_B, ("decoder", "compressor")),
        (STAGE_C, ("prior",)),
    ):
        content: dict[str, Any] = {}
        configs: dict[str, Any] = {"settings": model.settings}
        for part in parts:
            if part in model.parts:
                configs[part], content[PARTS[part][0]] = _outward(model.parts[part])
        if content:
            path.mkdir(parents=True, exist_ok=True)
            torch.save({**content, CONFIG: configs}, path / name)


def _outward(part: Part) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A part's arguments, and its tensors under the authors' names."""
    part = move_scale_to_config(part)
    table = key_mappings(part.config, part.tensors, "upstream")
    return part.config, {name: t.load() for name, t in to_upstream(part.tensors, table).items()}
