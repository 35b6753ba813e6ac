"""Checkpoints of runs: find one, check it, and build the stage that it holds.

A checkpoint may come from a stranger. It is read with ``weights_only=True``, and the classes that
its config names are built only if they stand in ``BUILDABLE``.
"""

import os
import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
from hydra.errors import InstantiationException

from wuerstchen_pl.checkpointing import sharded
from wuerstchen_pl.io import atomic

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

ALLOWED_TARGETS = frozenset(
    f"wuerstchen_pl.{name}"
    for name in (
        "checkpointing.load.load_stage",
        "data.caches.cached_dataset.CachedDataModule",
        "data.ordering.filters.Filters",
        "data.sources.folder.FolderSource",
        "data.sources.hub.HubDataset",
        "data.factories.folder",
        "data.factories.hf",
        "data.factories.mix",
        "data.factories.openmoji",
        "data.factories.shards",
        "data.sources.openmoji.OpenMoji",
        "data.sources.shards.ShardSource",
        "models.compressor.ConvBackbone",
        "models.compressor.EfficientNet",
        "models.compressor.SemanticCompressor",
        "models.diffnext.DiffNeXt",
        "models.paella.Paella",
        "models.discriminator.Discriminator",
        "models.prior.Prior",
        "models.text.TextEncoder",
        "models.unet.UNet",
        "models.vqgan.VQGAN",
        "stages.a.StageA",
        "stages.b.StageB",
        "stages.c.StageC",
        "stages.ldm.StageLDM",
    )
)


def find_checkpoint(run: str | Path) -> Path:
    """The newest whole checkpoint of a run's folder, or ``run`` itself if it is a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged, or all of the folder's are.
    """
    path = Path(run)
    if _is_checkpoint(path):
        if atomic.is_intact(path):
            return path
        raise ValueError(f"{path} is damaged: its sha256 is not the one beside it; name another")
    found = sorted(path.glob("checkpoints/step*.ckpt"), key=parse_step, reverse=True)
    if not found:
        missing = "holds no checkpoint" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {missing}")
    for newest in found:
        if atomic.is_intact(newest):
            return newest
        warnings.warn(f"{newest} is damaged, and the one before it is taken", stacklevel=2)
    raise ValueError(f"all {len(found)} checkpoints of {path} are damaged; train again")


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() or sharded.is_sharded(path)


def parse_step(path: Path) -> int:
    """The step in a checkpoint's name, or -1 where it bears none."""
    match = re.fullmatch(r"step(\d+)", path.stem)
    return int(match[1]) if match else -1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint, a file or in parts; runs no code of it.

    Raises:
        ValueError: if the file is damaged, or wants more than tensors and plain values.
    """
    with path.open("rb") if path.is_file() else nullcontext() as file:
        try:
            if file is None:
                content = sharded.read_sharded(path)
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's own text advises to load it all the same
            raise ValueError(
                f"{path} is damaged or no checkpoint, or holds more than tensors and plain values; "
                "it is not loaded"
            ) from error
    kept = ("stage", "state_dict", "ema", "frozen")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in kept):
        raise ValueError(f"{path} is no checkpoint of a wuerstchen_pl run: it names no stage")
    return content


def instantiate_allowed(config: Any) -> Any:
    """Instantiate a config out of a checkpoint or a run, if all that it names is allowed.

    Raises:
        ValueError: for a ``_target_`` outside of ``BUILDABLE``, or an interpolation.
    """
    reject_untrusted(config)
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except InstantiationException as error:  # around the one that says what is wrong
        raise error.__cause__ or error from None


def reject_untrusted(node: Any) -> None:
    """Refuse a config that names a class which is none of this package's, or interpolates."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and target not in ALLOWED_TARGETS:
            raise ValueError(f"_target_={target!r} in a checkpoint is not one of this package's")
        if node.get("allow_pipe"):
            raise ValueError("allow_pipe=true in a checkpoint would run commands, which are not")
        for value in node.values():
            reject_untrusted(value)
    elif isinstance(node, list | tuple):
        for value in node:
            reject_untrusted(value)
    elif isinstance(node, str) and "${" in node:
        raise ValueError(f"{node!r} in a checkpoint is an interpolation, which is not read")


def load_stage(*, run: str | Path, stage: str, ema: bool = True) -> "Stage":
    """The trained stage of a run, with the frozen stages that it names, ready to sample.

    Args:
        run: a run's folder, or a checkpoint file.
        stage: ``a``, ``b`` or ``c``: what is expected there.
        ema: averaged weights, or raw ones.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it holds another stage, is damaged, or was trained over weights that are no
            longer there.
    """
    path = _trained(run, stage)
    content = read_checkpoint(path)
    needed = f"wuerstchen_pl.stages.{stage}.Stage{stage.upper()}"
    if content["stage"].get("_target_") != needed:
        held = str(content["stage"].get("_target_")).rsplit(".", 1)[-1]
        raise ValueError(
            f"{path} holds {held}, where Stage{stage.upper()} is needed; name one of stage={stage}"
        )
    config = _to_sample(content)
    for name, named in content["frozen"].items():
        config[name] = {**config[name], "run": str(resolve_frozen(path, name, named))}
    module: Stage = instantiate_allowed(config)
    module.check_files(content.get("files", {}))
    state = dict(content["state_dict"])
    if ema:
        state |= content["ema"]["shadow"]
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of the networks it names") from error
    module.ema.load_state_dict({**content["ema"], "shadow": {}})
    module.config = content["stage"]
    module.source = {"path": str(path), "sha256": atomic.sha256(path)}
    return module.eval()


def _trained(run: str | Path, stage: str) -> Path:
    try:
        return find_checkpoint(run)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; train Stage {stage.upper()} first "
            f"(python -m wuerstchen_pl.train stage={stage}), or name its run with "
            f"{'paths.stage_' + stage if stage != 'c' else 'model'}="
        ) from None


def _to_sample(content: dict[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint's stage, without what only training needs."""
    config = content["stage"]
    training_only = hydra.utils.get_class(config["_target_"]).TRAINING_ONLY  # type: ignore[attr-defined]
    held = {key.partition(".")[0] for key in content["state_dict"]}
    return {
        key: drop_weight_paths(value) if key in held else value
        for key, value in config.items()
        if key not in training_only
    }


def drop_weight_paths(node: Any) -> Any:
    """A part's config without the pretrained weights it started from: its own are at hand."""
    if not isinstance(node, dict):
        return node
    return {k: None if k == "weights" else drop_weight_paths(v) for k, v in node.items()}


def resolve_frozen(path: Path, name: str, named: dict[str, str]) -> Path:
    """Where the frozen stage of the checkpoint at ``path`` lies: beside its run, or as named."""
    run = path.parent.parent
    beside = Path(os.path.normpath(run / named["path"]))
    found = beside if _is_checkpoint(beside) else Path(named["path"])
    if not _is_checkpoint(found):
        raise FileNotFoundError(f"{path} needs its {name} {beside}, which is not there")
    if atomic.sha256(found) != named["sha256"]:
        raise ValueError(
            f"{path} was trained over {found} with sha256 {named['sha256'][:12]}, and that file "
            f"has changed to {atomic.sha256(found)[:12]}; put the old one back or train again"
        )
    return found
