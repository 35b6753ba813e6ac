"""Checkpoints of runs: find one, verify it, and build the stage in it.

A checkpoint may come from an untrusted source. It is read with ``weights_only=True``, and the
classes that its config names are built only if they are in ``ALLOWED_TARGETS``.
"""

import logging
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch
from hydra.errors import InstantiationException

from wuerstchen_pl.checkpointing import sharded
from wuerstchen_pl.io import atomic

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)

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
REQUIRED = ("stage", "state_dict", "ema", "frozen")


# Find and read


def find_checkpoint(run: str | Path) -> Path:
    """The newest intact checkpoint of a run's folder, or ``run`` itself if it is a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged, or all of the folder's are.
    """
    path = Path(run)
    if _is_checkpoint(path):
        if atomic.is_intact(path):
            return path
        raise ValueError(
            f"{path} is damaged: its sha256 differs from the recorded one; use another"
        )
    checkpoints = sorted(path.glob("checkpoints/step*.ckpt"), key=parse_step, reverse=True)
    if not checkpoints:
        missing = "contains no checkpoint" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {missing}")
    for newest in checkpoints:
        if atomic.is_intact(newest):
            return newest
        warnings.warn(f"{newest} is damaged; using the checkpoint before it", stacklevel=2)
    raise ValueError(f"all {len(checkpoints)} checkpoints of {path} are damaged; train again")


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() or sharded.is_sharded(path)


def parse_step(path: Path) -> int:
    """The step in a checkpoint's name, or -1 if its name has none."""
    match = re.fullmatch(r"step(\d+)", path.stem)
    return int(match[1]) if match else -1


def read_checkpoint(path: Path, *, optimizer_state: bool = True) -> dict[str, Any]:
    """The contents of a checkpoint, a single file or sharded; runs no code from it.

    Tensors of a single file are memory-mapped: what is not used is not read.

    Args:
        path: of the file or folder.
        optimizer_state: False leaves the optimizer's tensors of a sharded checkpoint out.

    Raises:
        ValueError: if the file is damaged, or contains more than tensors and plain values.
    """
    try:
        if path.is_file():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            skipped = () if optimizer_state else ("optimizer_states",)
            content = sharded.read_sharded(path, skip=skipped)
    except Exception as error:  # torch's own message advises to load it anyway
        raise ValueError(
            f"{path} is damaged, not a checkpoint, or contains more than tensors and plain values; "
            "it was not loaded"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in REQUIRED):
        raise ValueError(f"{path} is not a checkpoint of a wuerstchen_pl run: it names no stage")
    return content


# Build


def instantiate_allowed(config: Any) -> Any:
    """Instantiate a config from a checkpoint or a run, if everything that it names is allowed.

    Raises:
        ValueError: for a ``_target_`` that is not in ``ALLOWED_TARGETS``, or an interpolation.
    """
    reject_untrusted(config)
    try:
        return hydra.utils.instantiate(config, _convert_="all")
    except InstantiationException as error:  # it wraps the one that says what is wrong
        raise error.__cause__ or error from None


def reject_untrusted(node: Any) -> None:
    """Refuse a config that names a class outside of this package, runs commands or interpolates."""
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and target not in ALLOWED_TARGETS:
            raise ValueError(f"_target_={target!r} in a checkpoint is not one of this package's")
        if node.get("allow_pipe"):
            raise ValueError(
                "allow_pipe=true in a checkpoint would run commands; it is not allowed"
            )
        for value in node.values():
            reject_untrusted(value)
    elif isinstance(node, list | tuple):
        for value in node:
            reject_untrusted(value)
    elif isinstance(node, str) and "${" in node:
        raise ValueError(f"{node!r} in a checkpoint is an interpolation, which is not allowed")


def load_stage(*, run: str | Path, stage: str, ema: bool = True) -> "Stage":
    """The trained stage of a run, with the frozen stages that it names, ready to sample.

    Args:
        run: a run's folder, or a checkpoint.
        stage: ``a``, ``b``, ``c`` or ``ldm``: the stage that is expected there.
        ema: use EMA weights; False uses the raw ones.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it contains another stage, is damaged, or was trained over frozen weights
            that have changed.
    """
    path = _find_trained(run, stage)
    content = read_checkpoint(path, optimizer_state=False)
    trained = trained_stage(content)
    if trained != stage:
        raise ValueError(
            f"{path} contains stage={trained}, but stage={stage} is needed; "
            f"name one of stage={stage}"
        )
    return build_stage(path, content, ema=ema)


def trained_stage(content: dict[str, Any]) -> str:
    """``a``, ``b``, ``c`` or ``ldm``: which stage a checkpoint, or a run's config, is of."""
    target = str(content["stage"].get("_target_"))
    return target.rpartition(".Stage")[2].lower()


def build_stage(path: Path, content: dict[str, Any], *, ema: bool = True) -> "Stage":
    """The stage in a checkpoint that was read already; see ``load_stage``."""
    config = _sampling_config(content)
    for name, recorded in content["frozen"].items():
        config[name] = {**config[name], "run": str(resolve_frozen(path, name, recorded))}
    module: Stage = instantiate_allowed(config)
    module.check_weight_files(content.get("files", {}))
    shadow = content["ema"]["shadow"]
    if ema and not shadow:
        logger.warning(
            "%s has no EMA weights yet (stage.ema.start_step is %s): using the raw ones",
            path, content["stage"].get("ema", {}).get("start_step", "later"),
        )  # fmt: skip
    try:
        module.load_state_dict({**content["state_dict"], **(shadow if ema else {})})
    except RuntimeError as error:
        raise ValueError(f"{path} does not contain the weights of its networks") from error
    module.ema.load_state_dict({**content["ema"], "shadow": {}})
    source: Any = {"path": str(path), "sha256": atomic.sha256(path)}
    module.record_provenance(config=content["stage"], source=source)
    return module.eval()


def _find_trained(run: str | Path, stage: str) -> Path:
    try:
        return find_checkpoint(run)
    except FileNotFoundError as error:
        key = f"paths.stage_{stage}" if stage in ("a", "b") else "model"
        raise FileNotFoundError(
            f"{error}; train Stage {stage.upper()} first "
            f"(python -m wuerstchen_pl.train stage={stage}), or set {key}= to its run"
        ) from None


def _sampling_config(content: dict[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint's stage, without what only training needs."""
    config = content["stage"]
    training_only = hydra.utils.get_class(config["_target_"]).TRAINING_ONLY  # type: ignore[attr-defined]
    trained = {key.partition(".")[0] for key in content["state_dict"]}
    return {
        key: drop_weight_paths(value) if key in trained else value
        for key, value in config.items()
        if key not in training_only
    }


def drop_weight_paths(node: Any) -> Any:
    """A network's config without the pretrained weights it started from: it has its own now."""
    if not isinstance(node, dict):
        return node
    return {k: None if k == "weights" else drop_weight_paths(v) for k, v in node.items()}


def resolve_frozen(path: Path, name: str, recorded: dict[str, str]) -> Path:
    """The checkpoint of a frozen stage that the checkpoint at ``path`` was trained over.

    Its path is recorded relative to the run's folder, so that runs can be moved together, and as an
    absolute path, so that one of the two can be moved alone.

    Raises:
        FileNotFoundError: if it is in neither place.
        ValueError: if it has changed.
    """
    run_dir = path.absolute().parent.parent
    candidates = [Path(os.path.normpath(run_dir / recorded["path"]))]
    candidates += [Path(recorded["absolute_path"])] if "absolute_path" in recorded else []
    frozen = next(filter(_is_checkpoint, candidates), None)
    if frozen is None:
        raise FileNotFoundError(f"{path} needs its {name} at {candidates[0]}, which does not exist")
    if atomic.sha256(frozen) != recorded["sha256"]:
        raise ValueError(
            f"{path} was trained over {frozen} with sha256 {recorded['sha256'][:12]}, which has "
            f"changed to {atomic.sha256(frozen)[:12]}; restore the old file or train again"
        )
    return frozen
