"""A trained run as a model: the stage of a checkpoint, and the frozen ones that it stands on."""

from pathlib import Path
from typing import Any

from wuerstchen_pl.checkpointing.load import (
    drop_weight_paths,
    find_checkpoint,
    load_stage,
    read_checkpoint,
)
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import Model, Part, with_defaults

STAGE_PARTS = {
    "StageA": {"vqgan": "vqgan"},
    "StageB": {"diffnext": "decoder", "compressor": "compressor", "text_encoder": "text_encoder"},
    "StageC": {"prior": "prior", "text_encoder": "prior_text_encoder"},
}
"""Networks of a stage, by attribute, and the parts that they are."""


def is_run(path: Path) -> bool:
    """Whether a path is that of a run's folder, or of a checkpoint in one."""
    return path.suffix == ".ckpt" or (path / "checkpoints").is_dir()


def read_run(run: str | Path, *, ema: bool = True) -> Model:
    """The networks of a run's newest checkpoint and of the stages below it.

    Args:
        run: a run's folder, or a checkpoint in it.
        ema: averaged weights of its own stage, or raw ones; the stages below were averaged when it
            was trained over them, and stay so.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged.
    """
    path = find_checkpoint(run)
    name = read_checkpoint(path)["stage"]["_target_"].rpartition(".")[2]
    if name not in STAGE_PARTS:
        raise ValueError(
            f"{run} is a run of {name}, which is no stage of the cascade; sample and evaluate take "
            "it, and no format holds it"
        )
    stage: Any = load_stage(run=path, stage=name[-1].lower(), ema=ema)
    model = Model(source=stage.source)
    if name == "StageC":
        model.settings = {
            "semantic_scale": stage.semantic_scale,
            "semantic_shift": stage.semantic_shift,
        }
    while stage is not None:
        model.parts |= _parts(stage)
        if (compressor := getattr(stage, "compressor", None)) is not None:
            pixels = compressor.resolution_multiple
            model.settings["resolution_multiple"] = pixels
            model.settings["latent_dim_scale"] = pixels / stage.decoder.vqgan.factor
        stage = getattr(stage, "decoder", None)
    return model


def _parts(stage: Any) -> dict[str, Part]:
    found = {}
    for attribute, part in STAGE_PARTS[type(stage).__name__].items():
        network = getattr(stage, attribute)
        if network is None:
            continue
        config = with_defaults(drop_weight_paths(stage.config[attribute]))
        tokenizer = config.get("tokenizer")
        if part.endswith("text_encoder"):
            config |= {"tokenizer": None, "vocab_size": network.tower.vocab_size}
        state = network.state_dict()
        if part == "vqgan":
            config["scale_factor"] = float(state["scale_factor"])
        tensors = {name: in_memory(tensor) for name, tensor in state.items()}
        found[part] = Part(config, tensors, Path(tokenizer) if tokenizer else None)
    return found
