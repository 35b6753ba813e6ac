"""Read a training run as a model: the stage of a checkpoint and its frozen stages."""

from pathlib import Path
from typing import Any

from wuerstchen_pl.checkpointing.load import (
    build_stage,
    drop_weight_paths,
    find_checkpoint,
    read_checkpoint,
    stage_class,
)
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import Model, Part, with_defaults

STAGE_PARTS = {
    "a": {"vqgan": "vqgan"},
    "b": {"diffnext": "decoder", "compressor": "compressor", "text_encoder": "text_encoder"},
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
    content = read_checkpoint(path, optimizer_state=False)
    if (name := stage_class(content["stage"]).name) not in STAGE_PARTS:
        raise ValueError(
            f"{run} is a run of stage={name}, which no model format supports; use it with sample "
            "and evaluate only"
        )
    stage: Any = build_stage(path, content, ema=ema)
    model = Model(source=stage.provenance.source)
    if name == "c":
        model.settings = {
            "semantic_scale": stage.scaling.scale,
            "semantic_shift": stage.scaling.shift,
        }
    while stage is not None:
        model.parts |= _parts(stage)
        if stage.name == "b":
            pixels = stage.compressor.resolution_multiple
            model.settings["resolution_multiple"] = pixels
            model.settings["latent_dim_scale"] = pixels / stage.stage_a.vqgan.factor
        stage = stage.frozen.get("stage_b") or stage.frozen.get("stage_a")
    return model


def _parts(stage: Any) -> dict[str, Part]:
    parts = {}
    for attribute, name in STAGE_PARTS[stage.name].items():
        network = getattr(stage, attribute)
        if network is None:
            continue
        config = with_defaults(drop_weight_paths(stage.provenance.config[attribute]))
        tokenizer = config.get("tokenizer")
        if name.endswith("text_encoder"):
            config |= {"tokenizer": None, "vocab_size": network.tower.vocab_size}
        state = network.state_dict()
        if name == "vqgan":
            config["scale_factor"] = float(state["scale_factor"])
        tensors = {key: in_memory(tensor) for key, tensor in state.items()}
        parts[name] = Part(config, tensors, Path(tokenizer) if tokenizer else None)
    return parts
