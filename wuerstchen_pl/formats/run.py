"""Read a training run as a model: the networks of its checkpoint and of its frozen stages.

No LightningModule is built, as Lightning takes seconds to import, and a model needs none.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from wuerstchen_pl.checkpointing.allowed import stage_name
from wuerstchen_pl.checkpointing.finite import check_finite
from wuerstchen_pl.checkpointing.load import (
    find_checkpoint,
    read_checkpoint,
    trained_weights,
)
from wuerstchen_pl.formats.checkpoint_parts import Checkpoint, read_part
from wuerstchen_pl.formats.detection import read_files
from wuerstchen_pl.formats.hub import resolve_source
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import (
    DECODER_SETTING,
    STUDENT,
    V1_SCALING,
    Model,
    Part,
    build_network,
    build_on_meta,
)
from wuerstchen_pl.formats.sources import check_sha256, checked_source
from wuerstchen_pl.formats.stage_parts import STAGE_PARTS, compressor_of, parts_of_stage
from wuerstchen_pl.io import atomic
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.models.meta import is_building_on_meta

FROZEN_STAGES = {"stage_b": "b", "stage_a": "a"}
"""Argument of a stage -> the frozen stage that it is."""
COMPRESSOR_ONLY = "wuerstchen_pl.formats.trained_stage.load_compressor"


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder or a checkpoint."""
    return path.suffix == ".ckpt" or (path / "checkpoints").is_dir()


def read_run(run: str | Path, *, ema: bool = True) -> Model:
    """Read the networks of a run's newest checkpoint and of its frozen stages.

    Args:
        run: a run's folder, or a checkpoint in it.
        ema: use EMA weights of the trained stage; False uses its raw weights. The frozen stages
            always have EMA weights, with which the stage was trained.

    Raises:
        FileNotFoundError: if there is no checkpoint, or a frozen stage is missing.
        ValueError: if it is damaged, or not of Stage A, B or C, or a frozen stage has changed.
    """
    path = find_checkpoint(run)
    content = read_checkpoint(path, tensors="ema" if ema else "raw")
    if (name := stage_name(content["stage"])) not in STAGE_PARTS:
        raise ValueError(
            f"{run} is a run of stage={name}, which no model format supports; use it with sample "
            "and evaluate only"
        )
    with contents_of(path, "use another checkpoint"):
        weights = trained_weights(path, content, ema=ema)
        if not is_building_on_meta():
            check_finite(weights, str(path))
        checkpoint = Checkpoint(path, content, weights)
        parts = {
            part: read_part(checkpoint, attribute)
            for attribute, part in {**STAGE_PARTS[name], "controlnet": "controlnet"}.items()
            if checkpoint.config(attribute) is not None
        }
        for key, frozen in FROZEN_STAGES.items():
            if (config := checkpoint.config(key)) is not None:
                parts |= _frozen_stage(config, frozen)
        settings = _scaling(content["stage"]) if name == "c" else {}
        settings |= _decoder_settings(parts)
    settings |= {} if (size := image_size(path)) is None else {"image_size": size}
    return Model(parts, settings, atomic.Source(path=str(path), sha256=atomic.sha256(path)))


def image_size(checkpoint: Path) -> int | None:
    """The side in pixels of the squares with the area of a run's images, from its config.yaml."""
    with suppress(Exception):  # it is not needed, and YAML can raise almost anything
        size = OmegaConf.load(checkpoint.parent.parent / "config.yaml").image_size
        return size if isinstance(size, int) and size > 0 else None
    return None


def _scaling(config: Mapping[str, Any]) -> dict[str, float]:
    """The settings in a Stage C's config; the defaults of its constructor are version 1's."""
    return V1_SCALING | {key: config[key] for key in (*V1_SCALING, STUDENT) if key in config}


def _decoder_settings(parts: Mapping[str, Part]) -> dict[str, float]:
    """The settings that follow from the networks."""
    networks: dict[str, Any] = {
        name: parts[name].network or build_on_meta(parts[name].config)
        for name in ("compressor", "vqgan")
        if name in parts
    }
    if "compressor" not in networks:
        return {}
    pixels = networks["compressor"].resolution_multiple
    if "vqgan" not in networks:
        return {"resolution_multiple": pixels}
    return {"resolution_multiple": pixels, DECODER_SETTING: pixels / networks["vqgan"].factor}


# Frozen stages


def _frozen_stage(config: dict[str, Any], name: str) -> dict[str, Part]:
    """The parts of a frozen stage, or of its compressor.

    Args:
        config: see ``argument_config``.
        name: ``a`` or ``b``.
    """
    path, recorded = resolve_source(str(config["source"])), config.get("sha256")
    if config["_target_"] == COMPRESSOR_ONLY:
        return _frozen_parts({"compressor": compressor_of(_read(path), path)}, path, recorded)
    if is_run(path):
        path = find_checkpoint(path)
        check_sha256(path, atomic.sha256(path), recorded)  # before a changed file is interpreted
    parts = dict(_read(path).parts)
    if "compressor" not in parts and (source := config.get("compressor")) is not None:
        parts["compressor"] = compressor_of(_read(resolve_source(str(source))), source)
    parts = parts_of_stage(parts, name, path)
    return parts if is_run(path) else _frozen_parts(parts, path, recorded)


def _read(path: Path) -> Model:
    return read_run(path) if is_run(path) else read_files(path)


def _frozen_parts(parts: Mapping[str, Part], path: Path, recorded: str | None) -> dict[str, Part]:
    """Parts of a model in float32, whose weights must be those of the training."""
    networks = {name: build_network(part).float() for name, part in parts.items()}
    checked_source(path, networks.values(), recorded)
    return {
        name: replace(
            parts[name],
            tensors={key: in_memory(tensor) for key, tensor in network.state_dict().items()},
            network=network,
        )
        for name, network in networks.items()
    }
