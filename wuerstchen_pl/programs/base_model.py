"""Completes the config of a training whose networks are those of a base model (``preset=base``)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from wuerstchen_pl.checkpointing.allowed import LOAD_COMPRESSOR
from wuerstchen_pl.checkpointing.load import drop_weight_paths
from wuerstchen_pl.cli.config import conf_dir
from wuerstchen_pl.cli.jobs import typed_keys
from wuerstchen_pl.formats.hub import is_hub_id
from wuerstchen_pl.formats.model import STUDENT, Model
from wuerstchen_pl.formats.registry import read_model
from wuerstchen_pl.formats.stage_parts import STAGE_PARTS

AUTO = "auto"
IMAGE_SIZE = 1024
"""Side in pixels of the images if the base model does not state its own: that of v2."""
SCALING = ("semantic_shift", "semantic_scale")
LOAD_NETWORK = "wuerstchen_pl.formats.pretrained.load_network"


def use_base_model(cfg: DictConfig) -> None:
    """Give the stage of a config the networks of ``init_from``; other presets do not change.

    Args:
        cfg: the config of ``train``, in which a network that a model completes has
            ``_partial_: true``. It is changed.

    Raises:
        FileNotFoundError: if a model does not exist.
        ValueError: for a network that is missing, with the key of a model that has it.
    """
    partial = networks_of_base_model(cfg)
    if not partial:
        return
    stage = stage_name(cfg)
    check_experiment(stage)
    base = _read_base(cfg, stage)
    if stage == "c" and STUDENT in base.settings:
        raise ValueError(
            f"init_from={cfg.init_from} is a distilled Stage C, which no longer predicts noise; "
            "train its teacher, and distill that again"
        )
    if cfg.image_size == AUTO:
        cfg.image_size = int(base.settings.get("image_size", IMAGE_SIZE))
    if "resolution_multiple" in base.settings:
        cfg.image_size_at_24 = round(24 * base.settings["resolution_multiple"])
    if cfg.bucket_multiple == AUTO:
        cfg.bucket_multiple = bucket_multiple(cfg.image_size)
    with open_dict(cfg):
        for name in partial:
            if name == "text_encoder":
                _use_text_encoder(cfg, base)
            else:
                part = STAGE_PARTS[stage][name]
                _complete(cfg, name, part, _arguments(base, "init_from", cfg, part))
        if stage == "b":
            cfg.stage.stage_a.source = cfg.init_from
        if stage == "c":
            _use_scaling(cfg, base.settings)
            _use_stage_b(cfg, base)
        if "controlnet" in cfg.stage:
            _complete_controlnet(cfg.stage.controlnet, cfg, base)
        if _is_partial(cfg.stage.get("teacher")):
            del cfg.stage.teacher["_partial_"]
            cfg.stage.teacher.source = cfg.init_from


def check_experiment(stage: str) -> None:
    """Refuse an experiment for other stages.

    Raises:
        ValueError: with the stages that it is for.
    """
    name = HydraConfig.get().runtime.choices.get("experiment")
    folder = Path(conf_dir(), "experiment", str(name))
    stages = sorted(path.stem for path in folder.glob("*.yaml"))
    if stages and stage not in stages:
        choices = " or ".join(f"stage={choice}" for choice in stages)
        raise ValueError(f"experiment={name} is not for stage={stage}; use {choices}")


def networks_of_base_model(cfg: DictConfig) -> list[str]:
    """The networks of a stage that ``init_from`` completes; none unless ``preset=base``."""
    parts = STAGE_PARTS.get(stage_name(cfg), {})
    return [name for name in parts if _is_partial(cfg.stage.get(name))]


def stage_name(cfg: DictConfig) -> str:
    """The stage of a config: ``a``, ``b``, ``c`` or ``ldm``."""
    return hydra.utils.get_class(cfg.stage._target_).name  # type: ignore[attr-defined]


def bucket_multiple(image_size: int) -> int:
    """The largest power of two that is at most an eighth of a side in pixels, 16 or more."""
    return max(16, 1 << (image_size // 8).bit_length() - 1)


def _is_partial(node: Any) -> bool:
    return isinstance(node, DictConfig) and bool(node.get("_partial_", False))


def _read_base(cfg: DictConfig, stage: str) -> Model:
    """The model of ``init_from``; a hub id without Stage C has it in a repository of its own."""
    if cfg.init_from is None:
        raise ValueError(
            "init_from is not set; set it to the model to start from: a run, a model or a hub id"
        )
    model = _read("init_from", cfg.init_from)
    if stage == "c" and "prior" not in model.parts and is_hub_id(cfg.init_from):
        cfg.decoder, cfg.init_from = cfg.decoder and str(cfg.decoder), f"{cfg.init_from}-prior"
        model = _read("init_from", cfg.init_from)
    return model


def _read(key: str, source: str) -> Model:
    """Read the model of a key, which errors start with."""
    try:
        return read_model(source)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from error


def _model_of(key: str, source: str | None, cfg: DictConfig, base: Model) -> Model:
    """The model of a key, or the base model if it is null."""
    return base if source in (None, cfg.init_from) else _read(key, str(source))


def _arguments(model: Model, key: str, cfg: DictConfig, part: str) -> Mapping[str, Any]:
    """The constructor's arguments of a part of the model of a key.

    Raises:
        ValueError: if the model lacks the part.
    """
    if part not in model.parts:
        source = cfg[key] or cfg.init_from
        raise ValueError(f"{key}={source} has no {part}; set {key} to a model that has one")
    return model.parts[part].config


def _complete(cfg: DictConfig, name: str, part: str, base: Mapping[str, Any]) -> None:
    """Merge the arguments of a base network with those of the config, or load it as it is."""
    kept = ("adapter", "text_adapter", "words", "controlnet")  # with one of them, its weights stay
    if any(cfg.stage.get(key) is not None for key in kept):
        cfg.stage[name] = {"_target_": LOAD_NETWORK, "source": cfg.init_from, "part": part}
        return
    chosen: Any = OmegaConf.to_container(cfg.stage[name], resolve=True)
    del chosen["_partial_"]
    if chosen["_target_"] != base["_target_"]:
        raise ValueError(
            f"init_from={cfg.init_from} has a {base['_target_']} as stage.{name}, but "
            f"{chosen['_target_']} is needed; use another model"
        )
    cfg.stage[name] = {**base, **chosen}


def _complete_controlnet(node: DictConfig, cfg: DictConfig, base: Model) -> None:
    """Give a ControlNet the sizes of the prior, and the layers of the compressor's backbone."""
    del node["_partial_"]
    prior = base.parts["prior"].config
    compressor = _model_of("compressor", cfg.compressor, cfg, base).parts["compressor"].config
    node.prior_width, node.prior_depth = prior["width"], prior["depth"]
    node.resize = compressor["resize"]
    node.backbone = drop_weight_paths(compressor["backbone"])


def _use_text_encoder(cfg: DictConfig, base: Model) -> None:
    """Read the text encoder from ``encoders``; none for a Stage B that reads no text."""
    node = cfg.stage.text_encoder
    decoder = base.parts.get("decoder")
    if "diffnext" in cfg.stage and decoder is not None and decoder.config["text_dim"] is None:
        cfg.stage.text_encoder = None
        return
    arguments = _arguments(
        _model_of("encoders", cfg.encoders, cfg, base), "encoders", cfg, node.part
    )
    if cfg.stage.get("train_text_encoder", False):
        cfg.stage.text_encoder = dict(arguments)
    else:
        del node["_partial_"]
        node.source = cfg.encoders or cfg.init_from


def _use_scaling(cfg: DictConfig, settings: Mapping[str, float]) -> None:
    for key in SCALING:
        if key in settings and f"stage.{key}" not in typed_keys():
            cfg.stage[key] = settings[key]


def _use_stage_b(cfg: DictConfig, base: Model) -> None:
    """Read Stages B and A from ``decoder``, or the compressor alone if there are none.

    Raises:
        ValueError: if there is no compressor, or ``decoder`` is set to a model without Stage B.
    """
    _arguments(_model_of("compressor", cfg.compressor, cfg, base), "compressor", cfg, "compressor")
    compressor = cfg.compressor or cfg.init_from
    if cfg.decoder is not None:
        if {"decoder", "vqgan"} <= _model_of("decoder", cfg.decoder, cfg, base).parts.keys():
            cfg.stage.stage_b.source, cfg.stage.stage_b.compressor = cfg.decoder, compressor
            return
        if cfg.decoder != cfg.init_from:
            raise ValueError(
                f"decoder={cfg.decoder} has no Stages B and A; set decoder to a model that has "
                "them, or decoder=null to train without grids"
            )
    cfg.stage.stage_b = {"_target_": LOAD_COMPRESSOR, "source": compressor}
