"""Completes the config of a training whose networks are those of a base model (``preset=base``)."""

from collections.abc import Mapping
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf, open_dict

from wuerstchen_pl.formats.model import Model
from wuerstchen_pl.formats.registry import is_hub_id, read_model
from wuerstchen_pl.formats.run import STAGE_PARTS
from wuerstchen_pl.jobs import typed_keys

AUTO = "auto"
IMAGE_SIZE = 1024
"""Side in pixels of the images if the base model does not state its own: that of v2."""
SCALING = ("semantic_shift", "semantic_scale")


def use_base_model(cfg: DictConfig) -> None:
    """Give the stage of a config the networks of ``init_from``; other configs do not change.

    Args:
        cfg: the config of ``train``, in which a network that the base model completes has
            ``_partial_: true``. It is changed.

    Raises:
        FileNotFoundError: if a model does not exist.
        ValueError: for each network that is missing, with the key of a model that has it.
    """
    stage: str = hydra.utils.get_class(cfg.stage._target_).name  # type: ignore[attr-defined]
    trained = [name for name in STAGE_PARTS.get(stage, {}) if _is_partial(cfg.stage.get(name))]
    if not trained:
        return
    base = _read_base(cfg, stage)
    if cfg.image_size == AUTO:
        cfg.image_size = int(base.settings.get("image_size", IMAGE_SIZE))
    with open_dict(cfg):
        for name in trained:
            _complete(cfg, name, _part(base, "init_from", cfg.init_from, STAGE_PARTS[stage][name]))
        if stage == "c":
            _use_scaling(cfg, base.settings)
            _use_encoders(cfg, base)


def _is_partial(node: Any) -> bool:
    return isinstance(node, DictConfig) and bool(node.get("_partial_", False))


def _read_base(cfg: DictConfig, stage: str) -> Model:
    """The model of ``init_from``; a hub id without Stage C has it in a repository of its own."""
    if cfg.init_from is None:
        raise ValueError(
            "init_from is not set; set it to the model to start from: a run, a model or a hub id"
        )
    model = read_model(cfg.init_from)
    if stage == "c" and "prior" not in model.parts and is_hub_id(cfg.init_from):
        decoder, cfg.init_from = cfg.init_from, f"{cfg.init_from}-prior"
        model = read_model(cfg.init_from)
        cfg.decoder = decoder if cfg.decoder == cfg.init_from else cfg.decoder
    return model


def _part(model: Model, key: str, source: str, part: str) -> Mapping[str, Any]:
    """The config of a part.

    Raises:
        ValueError: if the model lacks it.
    """
    if part not in model.parts:
        raise ValueError(f"{key}={source} has no {part}; set {key} to a model that has one")
    return model.parts[part].config


def _complete(cfg: DictConfig, name: str, base: Mapping[str, Any]) -> None:
    """Merge the constructor's arguments of a base network with those of the config."""
    chosen: Any = OmegaConf.to_container(cfg.stage[name], resolve=True)
    del chosen["_partial_"]
    if chosen["_target_"] != base["_target_"]:
        raise ValueError(
            f"init_from={cfg.init_from} has a {base['_target_']} as stage.{name}, but "
            f"{chosen['_target_']} is needed; use another model"
        )
    cfg.stage[name] = {**base, **chosen}


def _use_scaling(cfg: DictConfig, settings: Mapping[str, float]) -> None:
    for key in SCALING:
        if key in settings and f"stage.{key}" not in typed_keys():
            cfg.stage[key] = settings[key]


def _use_encoders(cfg: DictConfig, base: Model) -> None:
    """Check that Stage C's frozen networks exist, and do without Stage B if there is none."""
    text_encoder = cfg.stage.text_encoder
    if text_encoder.get("part") is not None:
        arguments = _part(
            _other(cfg, "encoders", base), "encoders", cfg.encoders, text_encoder.part
        )
        if cfg.stage.train_text_encoder:
            cfg.stage.text_encoder = dict(arguments)
    _part(_other(cfg, "compressor", base), "compressor", cfg.compressor, "compressor")
    needed = {"decoder", "vqgan"}
    has_decoder = cfg.decoder is not None and needed <= _other(cfg, "decoder", base).parts.keys()
    if cfg.decoder not in (None, cfg.init_from) and not has_decoder:
        raise ValueError(
            f"decoder={cfg.decoder} has no Stages B and A; set decoder to a model that has them, "
            "or decoder=null to train without grids"
        )
    if not has_decoder:
        cfg.stage.stage_b = {
            "_target_": "wuerstchen_pl.formats.trained_stage.load_compressor",
            "source": cfg.compressor,
        }


def _other(cfg: DictConfig, key: str, base: Model) -> Model:
    """The model of a key, which is the base model unless it is set."""
    if cfg[key] is None:
        raise ValueError(f"{key} is null; set {key} to a model")
    return base if cfg[key] == cfg.init_from else read_model(cfg[key])
