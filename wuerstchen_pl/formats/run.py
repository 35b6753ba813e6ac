"""Read a training run as a model: the stage of a checkpoint and its frozen stages."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf
from torch import Tensor, nn

from wuerstchen_pl.checkpointing.allowed import stage_class
from wuerstchen_pl.checkpointing.load import (
    build_stage,
    drop_weight_paths,
    find_checkpoint,
    read_checkpoint,
)
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import STUDENT, Model, Part, with_defaults
from wuerstchen_pl.models.text import TextEncoder

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

STAGE_PARTS = {
    "a": {"vqgan": "vqgan"},
    "b": {
        "diffnext": "decoder",
        "paella": "decoder",  # of version 1
        "compressor": "compressor",
        "text_encoder": "text_encoder",
    },
    "compressor": {"compressor": "compressor"},
    "c": {"prior": "prior", "text_encoder": "prior_text_encoder"},
}
"""Stage -> attribute of the network -> name of the part."""


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
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, or not of Stage A, B or C.
    """
    path = find_checkpoint(run)
    content = read_checkpoint(path, tensors="ema" if ema else "raw")
    if (name := stage_class(content["stage"]).name) not in STAGE_PARTS:
        raise ValueError(
            f"{run} is a run of stage={name}, which no model format supports; use it with sample "
            "and evaluate only"
        )
    trained = build_stage(path, content, ema=ema)
    parts: dict[str, Part] = {}
    settings: dict[str, float] = {}
    stage: Stage | None = trained
    while stage is not None:
        parts |= _parts(stage)
        settings |= _settings(stage)
        stage = cast("Stage | None", stage.frozen.get("stage_b") or stage.frozen.get("stage_a"))
    settings |= {} if (size := image_size(path)) is None else {"image_size": size}
    return Model(parts, settings, trained.provenance.source)


def image_size(checkpoint: Path) -> int | None:
    """The side in pixels of the squares with the area of a run's images, from its config.yaml."""
    with suppress(Exception):  # it is not needed, and YAML can raise almost anything
        size = OmegaConf.load(checkpoint.parent.parent / "config.yaml").image_size
        return size if isinstance(size, int) and size > 0 else None
    return None


def _settings(stage: "Stage") -> dict[str, float]:
    """The settings of a pipeline that follow from a stage's arguments and networks."""
    if stage.name == "c":
        scaling = {"semantic_scale": stage.scaling.scale, "semantic_shift": stage.scaling.shift}
        steps = getattr(stage, STUDENT, None)
        return scaling if steps is None else {**scaling, STUDENT: steps}
    if stage.name == "compressor":
        return {"resolution_multiple": stage.compressor.resolution_multiple}
    if stage.name == "b":
        pixels = stage.compressor.resolution_multiple
        scale = pixels / stage.stage_a.vqgan.factor
        return {"resolution_multiple": pixels, "latent_dim_scale": scale}
    return {}


def _parts(stage: "Stage") -> dict[str, Part]:
    config = stage.provenance.config or {}
    parts = {}
    for attribute, name in STAGE_PARTS[stage.name].items():
        network: nn.Module | None = getattr(stage, attribute, None)
        if network is not None:
            arguments = getattr(network, "arguments", None)  # of a network from a model
            adapter = stage.adapters.get(attribute)
            state = network.state_dict() if adapter is None else adapter.merged_state(network)
            parts[name] = _part(name, network, state, arguments or config[attribute])
    if (controlnet := getattr(stage, "controlnet", None)) is not None:
        state = controlnet.state_dict()
        parts["controlnet"] = _part("controlnet", controlnet, state, config["controlnet"])
    return parts


def _part(
    name: str, network: nn.Module, state: Mapping[str, Tensor], stage_config: dict[str, Any]
) -> Part:
    config = with_defaults(drop_weight_paths(stage_config))
    tokenizer = config.get("tokenizer")
    if isinstance(network, TextEncoder):
        config |= {"tokenizer": None, "vocab_size": network.tower.vocab_size}
    if name == "vqgan" and not state["scale_factor"].is_meta:
        config["scale_factor"] = float(state["scale_factor"])
    tensors = {key: in_memory(tensor) for key, tensor in state.items()}
    is_merged = state.keys() != network.state_dict().keys()
    built = None if is_merged else network
    return Part(config, tensors, Path(tokenizer) if tokenizer else None, built)
