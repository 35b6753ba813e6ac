"""Initial weights of a stage, from a run or from a model of any format."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from wuerstchen_pl.checkpointing.load import find_checkpoint, read_checkpoint
from wuerstchen_pl.formats.compatibility import ENCODERS, check_encoder, check_scaling, encoder_of
from wuerstchen_pl.formats.detection import find_format
from wuerstchen_pl.formats.hub import resolve_source
from wuerstchen_pl.formats.model import V1_SCALING, Model
from wuerstchen_pl.formats.registry import read_model
from wuerstchen_pl.formats.stage_parts import STAGE_PARTS
from wuerstchen_pl.io.contents import contents_of

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)


class InitialWeights(NamedTuple):
    """The networks of a source, in the names of the stage that starts from them."""

    config: dict[str, Any]
    """The ``stage`` node of its config."""
    tensors: dict[str, Tensor]
    encoder: str | None
    """Fingerprint of the network whose latents they were trained on; None if it is not known."""
    scaling: tuple[float, float] | None
    """(shift, scale) of the latents that a Stage C was trained on; None if it is not known."""
    description: str


def load_initial_weights(stage: "Stage", source: str, *, allow_mismatch: bool = False) -> None:
    """Copy the weights of a run or a model into the networks that a stage trains.

    Of a run these are the EMA weights, or the raw weights if it has none yet. Networks that a model
    does not have, such as Stage A's discriminator, keep their weights.

    Args:
        stage: a new stage, whose config was recorded.
        source: a run, a checkpoint, or a model of any format or a hub id.
        allow_mismatch: accept weights that were trained on the latents of another network.

    Raises:
        FileNotFoundError: if there is no such checkpoint or model.
        ValueError: if it is of another stage, lacks a network, has networks of other sizes, or was
            trained on other latents.
    """
    path = resolve_source(source)
    if find_format(path) is None:
        path = find_checkpoint(path)
        weights = _from_checkpoint(path, stage)
    else:
        weights = _from_model(read_model(str(path)), path, stage)
    origin = f"init_from={path}"
    # whose networks have these weights already
    is_base = any(getattr(part, "source", None) is not None for part in stage.children())
    if not is_base:
        checkpoint = {"stage": weights.config, "state_dict": weights.tensors}
        stage.check_checkpoint(checkpoint, origin=origin)
    frozen: Any = stage.frozen.get(ENCODERS.get(stage.name, ""))
    if frozen is not None and not allow_mismatch:
        check_encoder(weights.encoder, frozen.provenance.encoder, origin)
        if stage.name == "c":
            check_scaling(weights.scaling, _scaling(stage.provenance.config or {}), origin)
    if not is_base:
        stage.load_state_dict(weights.tensors)
    logger.info("init_from: %s, %s", path, "base model" if is_base else weights.description)


def _scaling(config: Mapping[str, Any]) -> tuple[float, float]:
    """The shift and scale of a Stage C's latents; the constructor's defaults are version 1's."""
    config = {**V1_SCALING, **config}
    return config["semantic_shift"], config["semantic_scale"]


def _from_checkpoint(path: Path, stage: "Stage") -> InitialWeights:
    content = read_checkpoint(path, tensors="ema")
    shadow = content["ema"]["shadow"]
    with contents_of(path, "use another checkpoint"):
        encoder = content["frozen"].get(ENCODERS.get(stage.name, ""), {}).get("encoder")
    kind = "EMA" if shadow else "raw (there is no EMA yet)"
    description = f"weights: {kind}, step {content.get('global_step')}"
    tensors = _without_frozen({**content["state_dict"], **shadow}, stage)
    scaling = _scaling(content["stage"])
    return InitialWeights(content["stage"], tensors, encoder, scaling, description)


def _without_frozen(tensors: dict[str, Tensor], stage: "Stage") -> dict[str, Tensor]:
    """The tensors without those that the stage has as a frozen network, with the same values."""
    frozen = {
        f"{name}.{key}": tensor
        for name, network in stage.frozen.present().items()
        if any(key.startswith(f"{name}.") for key in tensors)
        for key, tensor in network.state_dict().items()
    }
    is_equal = all(k in tensors and torch.equal(tensors[k], frozen[k]) for k in frozen)
    return {k: t for k, t in tensors.items() if k not in frozen} if is_equal else tensors


def _from_model(model: Model, path: Path, stage: "Stage") -> InitialWeights:
    trained = dict(stage.named_children())
    if stage.name not in STAGE_PARTS:
        raise ValueError(
            f"init_from={path} is a model, and no format has stage={stage.name}; use a run"
        )
    parts = {
        attribute: part
        for attribute, part in STAGE_PARTS[stage.name].items()
        if attribute in trained and attribute not in stage.adapters  # these have their weights
    }
    if missing := [part for part in parts.values() if part not in model.parts]:
        raise ValueError(
            f"init_from={path} lacks {' and '.join(missing)}, which stage={stage.name} trains; add "
            "missing parts with python -m wuerstchen_pl.convert, or use another model"
        )
    config = dict(stage.provenance.config or {})
    kept = [name for name in trained if name not in parts]
    state = stage.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if name.split(".")[0] not in parts}
    for attribute, name in parts.items():
        config[attribute] = model.parts[name].config
        tensors |= {f"{attribute}.{k}": t.load() for k, t in model.parts[name].tensors.items()}
    description = f"weights: {', '.join(parts)}" + f"; new: {', '.join(kept)}" * bool(kept)
    stated = model.settings
    scaling = _scaling(stated) if stated.keys() >= {"semantic_shift", "semantic_scale"} else None
    return InitialWeights(config, tensors, encoder_of(model, stage.name), scaling, description)
