"""Read a training run as a model: the networks of its checkpoint and of its frozen stages.

No LightningModule is built, as Lightning takes seconds to import, and a model needs none.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from torch import Tensor

from wuerstchen_pl.checkpointing.allowed import (
    DISTILLATION,
    LOAD_COMPRESSOR,
    LOAD_STAGE,
    stage_name,
)
from wuerstchen_pl.checkpointing.finite import check_finite
from wuerstchen_pl.checkpointing.load import (
    find_checkpoint,
    read_checkpoint,
    trained_weights,
)
from wuerstchen_pl.checkpointing.stage_arguments import check_stage_arguments
from wuerstchen_pl.formats.checkpoint_parts import Checkpoint, part_of, read_part
from wuerstchen_pl.formats.detection import find_format, read_files
from wuerstchen_pl.formats.hub import resolve_source
from wuerstchen_pl.formats.model import (
    DECODER_SETTING,
    STUDENT,
    V1_SCALING,
    Model,
    Part,
    build_network,
    validate_settings,
)
from wuerstchen_pl.formats.sources import check_sha256, checked_source
from wuerstchen_pl.formats.stage_parts import NEEDED, STAGE_PARTS, compressor_of, parts_of_stage
from wuerstchen_pl.io import atomic
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.models.meta import is_building_on_meta
from wuerstchen_pl.signatures import check_objects

FROZEN_STAGES = {"stage_b": "b", "stage_a": "a"}
"""Argument of a stage -> the frozen stage that it is."""
NOT_IN_MODELS = {"a": ("discriminator", "code_uses")}
"""Stage -> its tensors that a model does not have."""


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder or a checkpoint."""
    return path.suffix == ".ckpt" or (path / "checkpoints").is_dir()


def read_run(run: str | Path, *, ema: bool = True) -> Model:
    """Read the networks of a run's newest checkpoint and of its frozen stages.

    Args:
        run: a run's folder, or a checkpoint in it.
        ema: use EMA weights of the trained stage; False uses its raw weights. The frozen stages
            have those with which the stage was trained.

    Raises:
        FileNotFoundError: if there is no checkpoint, or if that of a frozen stage is not found.
        ValueError: if it is damaged, or not of Stage A, B or C, or a frozen stage has changed.
    """
    path = find_checkpoint(run)
    parts, settings = _read_networks(path, ema=ema)
    settings |= {} if (size := image_size(path)) is None else {"image_size": size}
    return Model(parts, settings, atomic.Source(path=str(path), sha256=atomic.sha256(path)))


def read_path(path: Path, variant: str | None = None) -> Model:
    """Read a run, or a model in any format; see ``read_run`` and ``detection.read_files``."""
    return read_run(path) if is_run(path) else read_files(path, variant)


def _read_networks(path: Path, *, ema: bool) -> tuple[dict[str, Part], dict[str, Any]]:
    """The networks of a checkpoint and of its frozen stages, and the settings that they imply."""
    content = read_checkpoint(path, tensors="ema" if ema else "raw")
    if (name := stage_name(content["stage"])) not in STAGE_PARTS:
        raise ValueError(
            f"{path} is a run of stage={name}, which no model format supports; use it with sample "
            "and evaluate only"
        )
    with contents_of(path, "use another checkpoint"):
        check_stage_arguments(content["stage"])
        weights = trained_weights(path, content, ema=ema)
        _check_tensors(weights, path)
        checkpoint = Checkpoint(path, content, weights)
        networks = {**STAGE_PARTS[name], "controlnet": "controlnet"}
        present = [key for key in networks if checkpoint.config(key) is not None]
        _check_prefixes(checkpoint, [*present, *NOT_IN_MODELS.get(name, ())])
        parts = {networks[key]: read_part(checkpoint, key) for key in present}
        for key, frozen in FROZEN_STAGES.items():
            if (config := checkpoint.config(key)) is not None:
                parts |= _frozen_stage(config, frozen)
        if missing := [part for part in NEEDED[name] if part not in parts]:
            raise ValueError(f"stage={name} lacks {' and '.join(missing)}; use another checkpoint")
        settings = _scaling(content["stage"]) if name == "c" else {}
        settings |= _decoder_settings(parts)
        return parts, validate_settings(settings, str(path))


def _check_tensors(weights: Mapping[str, Any], path: Path) -> None:
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"state_dict.{name} is not a tensor; use another checkpoint")
    if not is_building_on_meta():
        check_finite(weights, str(path))


def _check_prefixes(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Refuse tensors that would be ignored."""
    words = () if checkpoint.config("words") is None else ("words",)
    for key in checkpoint.weights:
        if key.partition(".")[0] not in {*names, *words}:
            raise ValueError(
                f"state_dict has {key}, which belongs to none of the stage's networks; use another "
                "checkpoint"
            )


def image_size(checkpoint: Path) -> int | None:
    """The side in pixels of the squares with the area of a run's images, from its config.yaml."""
    with suppress(Exception):  # it is not needed, and YAML can raise almost anything
        size = OmegaConf.load(checkpoint.parent.parent / "config.yaml").image_size
        return size if isinstance(size, int) and size > 0 else None
    return None


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a Stage C's config; the defaults of its constructor are version 1's."""
    student = {STUDENT: config[STUDENT]} if config["_target_"] == DISTILLATION else {}
    return V1_SCALING | {key: config[key] for key in V1_SCALING if key in config} | student


def _decoder_settings(parts: Mapping[str, Part]) -> dict[str, Any]:
    """The settings that follow from the networks."""
    if "compressor" not in parts:
        return {}
    pixels = cast(Any, parts["compressor"].network).resolution_multiple
    if "vqgan" not in parts:
        return {"resolution_multiple": pixels}
    factor = cast(Any, parts["vqgan"].network).factor
    return {"resolution_multiple": pixels, DECODER_SETTING: pixels / factor}


# Frozen stages


def _frozen_stage(config: dict[str, Any], name: str) -> dict[str, Part]:
    """The parts of a frozen stage, or of its compressor.

    Args:
        config: that ``load_stage`` or ``load_compressor`` would be called with: the path, and the
            hash that is recorded, if any.
        name: ``a`` or ``b``.
    """
    is_compressor = config["_target_"] == LOAD_COMPRESSOR
    if not is_compressor and (config["_target_"], config.get("stage")) != (LOAD_STAGE, name):
        raise ValueError(
            f"stage.stage_{name} is not a frozen Stage {name.upper()}; use another checkpoint"
        )
    check_objects(config, f"stage.stage_{name}")
    path, recorded = resolve_source(str(config["source"])), config.get("sha256")
    if is_compressor:
        return _frozen_parts({"compressor": compressor_of(read_path(path), path)}, path, recorded)
    is_model = find_format(path) is not None
    if is_model:
        parts = dict(read_files(path).parts)
    else:
        path = find_checkpoint(path)
        check_sha256(path, atomic.sha256(path), recorded)  # before a changed file is interpreted
        parts, _ = _read_networks(path, ema=config.get("ema", True))
    if "compressor" not in parts and (source := config.get("compressor")) is not None:
        parts["compressor"] = compressor_of(read_path(resolve_source(str(source))), source)
    parts = parts_of_stage(parts, name, path)
    return _frozen_parts(parts, path, recorded) if is_model else parts


def _frozen_parts(parts: Mapping[str, Part], path: Path, recorded: str | None) -> dict[str, Part]:
    """Parts of a model in float32, whose weights must be those of the training."""
    networks = {name: build_network(part).float() for name, part in parts.items()}
    checked_source(path, networks.values(), recorded)
    return {
        name: replace(
            part_of(network, parts[name].config, network.state_dict()),
            tokenizer=parts[name].tokenizer,
        )
        for name, network in networks.items()
    }
