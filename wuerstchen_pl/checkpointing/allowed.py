"""The classes that a checkpoint, a run or a model on disk may name: it runs no other code."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import hydra
from hydra.errors import InstantiationException

from wuerstchen_pl.signatures import check_objects

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

DISTILLATION = "wuerstchen_pl.stages.distillation.DistillationStage"
STAGE_NAMES = {
    "wuerstchen_pl.stages.a.StageA": "a",
    "wuerstchen_pl.stages.b.StageB": "b",
    "wuerstchen_pl.stages.b_tokens.TokenStageB": "b",
    "wuerstchen_pl.stages.c.StageC": "c",
    "wuerstchen_pl.stages.controlnet.ControlNetStage": "c",
    DISTILLATION: "c",
    "wuerstchen_pl.stages.ldm.StageLDM": "ldm",
}
"""The class of a stage -> its ``name``, for programs that need not import it."""
STAGE_TARGETS = frozenset(STAGE_NAMES)
COMPRESSOR_ONLY = "wuerstchen_pl.stages.compressor_only.CompressorOnly"
LOAD_STAGE = "wuerstchen_pl.formats.trained_stage.load_stage"
LOAD_COMPRESSOR = "wuerstchen_pl.formats.trained_stage.load_compressor"
NETWORK_TARGETS = frozenset(
    f"wuerstchen_pl.models.{name}"
    for name in (
        "compressor.ConvBackbone",
        "compressor.EfficientNet",
        "compressor.SemanticCompressor",
        "control_images.Edges",
        "control_images.Files",
        "control_images.LowResolution",
        "control_images.Masked",
        "controlnet.ControlNet",
        "diffnext.DiffNeXt",
        "paella.Paella",
        "discriminator.Discriminator",
        "prior.Prior",
        "text.TextEncoder",
        "unet.UNet",
        "vqgan.VQGAN",
    )
)
DATA_TARGETS = frozenset(
    f"wuerstchen_pl.data.{name}"
    for name in (
        "caches.cached_dataset.CachedDataModule",
        "loading.captions.Captions",
        "ordering.filters.Filters",
        "sources.folder.FolderSource",
        "sources.hub.HubDataset",
        "factories.folder",
        "factories.hf",
        "factories.mix",
        "factories.openmoji",
        "factories.shards",
        "sources.openmoji.OpenMoji",
        "sources.shards.ShardSource",
    )
)
ALLOWED_TARGETS = (
    STAGE_TARGETS
    | NETWORK_TARGETS
    | DATA_TARGETS
    | {
        LOAD_STAGE,
        LOAD_COMPRESSOR,
        "wuerstchen_pl.adapters.adapter.Adapter",
        "wuerstchen_pl.adapters.words.NewWords",
        "wuerstchen_pl.formats.pretrained.load_network",
    }
)


def instantiate_allowed(config: Any, key: str = "") -> Any:
    """Instantiate a config from a checkpoint or a run, if ``reject_untrusted`` allows it.

    Args:
        config: nested dicts and lists.
        key: the key of ``config`` in its file, which errors start with.

    Raises:
        ValueError: for a ``_target_`` that is not in ``ALLOWED_TARGETS``, an interpolation, or
            arguments that do not match a constructor.
    """
    reject_untrusted(config)
    check_objects(config, key)
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except InstantiationException as error:  # the cause has the message
        raise error.__cause__ or error from None


def reject_untrusted(node: Any) -> None:
    """Refuse a config with other targets than ``ALLOWED_TARGETS``, commands or interpolations."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and target not in ALLOWED_TARGETS:
            raise ValueError(f"_target_={target!r} in a checkpoint is not one of this package's")
        if node.get("allow_pipe"):
            raise ValueError(
                "allow_pipe=true in a checkpoint would run commands, which is not allowed"
            )
        for value in node.values():
            reject_untrusted(value)
    elif isinstance(node, list | tuple):
        for value in node:
            reject_untrusted(value)
    elif isinstance(node, str) and "${" in node:
        raise ValueError(f"{node!r} in a checkpoint is an interpolation, which is not allowed")


def stage_class(config: Mapping[str, Any]) -> "type[Stage]":
    """The class of a stage's config, from a checkpoint or a run.

    Raises:
        ValueError: if it is not a stage of this package; nothing is imported then.
    """
    check_stage(config)
    return hydra.utils.get_class(config["_target_"])


def stage_name(config: Mapping[str, Any]) -> str:
    """The name of a stage's config, such as ``c``; see ``stage_class``, but nothing is imported."""
    check_stage(config)
    return STAGE_NAMES[config["_target_"]]


def check_stage(config: Mapping[str, Any]) -> None:
    """Refuse a config that is not of a stage; see ``stage_class``."""
    if (target := config.get("_target_")) not in STAGE_TARGETS:
        raise ValueError(
            f"stage._target_={target!r} is not a stage of this package; use another checkpoint"
        )
