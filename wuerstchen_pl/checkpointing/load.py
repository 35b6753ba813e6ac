"""Checkpoints of runs: find and verify one, and build its stage.

A checkpoint may be untrusted. It is read with ``weights_only=True``, and the classes in its config
are instantiated only if they are allowed; see ``allowed.py``.
"""

import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from wuerstchen_pl.checkpointing import sharded
from wuerstchen_pl.checkpointing.allowed import (
    check_stage,
    instantiate_allowed,
    stage_class,
)
from wuerstchen_pl.checkpointing.finite import check_finite
from wuerstchen_pl.checkpointing.weight_files import check_weight_files
from wuerstchen_pl.io import atomic
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.signatures import check_entries

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)

REQUIRED = ("stage", "state_dict", "ema", "frozen")
EMA: Mapping[str, Any] = {"num_steps": int, "num_updates": int, "shadow": dict}
"""Types of the entries of ``ema``."""


# Find and read


def find_checkpoint(run: str | Path) -> Path:
    """The newest intact checkpoint of a run's folder, or ``run`` itself if it is a checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the checkpoint, or every checkpoint in the folder, is damaged.
    """
    path = Path(run)
    if _is_checkpoint(path):
        if atomic.is_intact(path):
            return path
        raise ValueError(
            f"{path} is damaged: its sha256 differs from the recorded one; use another checkpoint"
        )
    checkpoints = sorted(path.glob("checkpoints/step*.ckpt"), key=parse_step, reverse=True)
    if not checkpoints:
        missing = "contains no checkpoint" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {missing}")
    for checkpoint in checkpoints:
        if atomic.is_intact(checkpoint):
            return checkpoint
        warnings.warn(f"{checkpoint} is damaged; using the checkpoint before it", stacklevel=2)
    raise ValueError(f"every checkpoint of {path} is damaged; train again")


def _is_checkpoint(path: Path) -> bool:
    return path.is_file() or sharded.is_sharded(path)


def parse_step(path: Path) -> int:
    """The step in a checkpoint's name, or -1 if there is none."""
    match = re.fullmatch(r"step(\d+)", path.stem)
    return int(match[1]) if match else -1


Tensors = Literal["all", "ema", "raw", "none"]


def read_checkpoint(path: Path, *, tensors: Tensors = "all") -> dict[str, Any]:
    """The contents of a checkpoint, a single file or sharded, without running code from it.

    Tensors of a single file are memory-mapped, so that unused ones are not read.

    Args:
        path: the file, or the folder of a sharded checkpoint.
        tensors: which tensors of a sharded checkpoint to read; the others are None. ``ema``: the
            EMA weights, and the raw weights of those that have none; ``raw``: the raw weights;
            ``none``: the config and the provenance only.

    Raises:
        ValueError: if the file is damaged, or contains more than tensors and plain values.
    """
    try:
        if path.is_file():
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:
            with torch.device("cpu"):  # also while networks are built on the meta device
                content = sharded.read_sharded(path, select=partial(_select, tensors=tensors))
    except Exception as error:  # torch's own message advises loading it with weights_only=False
        raise ValueError(
            f"{path} is damaged, not a checkpoint, or contains more than tensors and plain values; "
            "it was not loaded"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in REQUIRED):
        raise ValueError(
            f"{path} is not a checkpoint of a wuerstchen_pl run: it lacks one of "
            f"{', '.join(REQUIRED)}"
        )
    with contents_of(path):
        check_stage(content["stage"])
        check_entries(content["ema"], EMA, "ema")
    return content


def _select(paths: Iterable[sharded.TreePath], *, tensors: Tensors) -> set[sharded.TreePath]:
    """The paths of a sharded checkpoint's tensors to read; see ``read_checkpoint``."""
    if tensors == "all":
        return set(paths)
    raw = {path for path in paths if path[0] == "state_dict" and tensors != "none"}
    shadow = {path for path in paths if path[:2] == ("ema", "shadow") and tensors == "ema"}
    return shadow | raw - {("state_dict", path[2]) for path in shadow}


# Build


def build_stage(path: Path, content: dict[str, Any], *, ema: bool = True) -> "Stage":
    """The stage in the contents of a checkpoint, with its frozen stages, ready to sample.

    Args:
        path: the checkpoint.
        content: its contents; see ``read_checkpoint``.
        ema: use EMA weights; False uses raw weights.

    Raises:
        FileNotFoundError: if a frozen stage is missing.
        ValueError: if the contents cannot be used, or a frozen stage has changed.
    """
    with contents_of(path, "use another checkpoint"):
        module = _build(path, content, ema=ema)
    source = atomic.Source(path=str(path), sha256=atomic.sha256(path))
    module.record_provenance(config=content["stage"], source=source)
    return module.eval()


def _build(path: Path, content: dict[str, Any], *, ema: bool) -> "Stage":
    training_only = stage_class(content["stage"]).TRAINING_ONLY
    names = [name for name in content["stage"] if name not in training_only]
    config = {name: argument_config(path, content, name) for name in names}
    module: Stage = instantiate_allowed(config, "stage")
    if any(weight.is_meta for weight in module.parameters()):
        return module  # built without weights
    check_weight_files(module.frozen.present(), content.get("files", {}))
    try:
        # ``assign`` frees the new module's memory; a single file's tensors stay memory-mapped, so
        # that the processes of a machine share them
        module.load_state_dict(trained_weights(path, content, ema=ema), assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not contain the weights of its networks") from error
    check_finite(module.state_dict(), str(path))
    module.ema.load_state_dict({**content["ema"], "shadow": {}})
    return module


def trained_weights(path: Path, content: dict[str, Any], *, ema: bool) -> dict[str, Tensor]:
    """The weights that a checkpoint's stage trained, by their names in the stage.

    Args:
        path: the checkpoint.
        content: its contents.
        ema: use the EMA weights of those that have some; False uses the raw weights of all.
    """
    shadow = content["ema"]["shadow"]
    if ema and not shadow:
        logger.warning(
            "%s has no EMA weights yet (stage.ema.start_step is %s): using raw weights",
            path, content["stage"].get("ema", {}).get("start_step", "later"),
        )  # fmt: skip
    return {**content["state_dict"], **(shadow if ema else {})}


def argument_config(path: Path, content: dict[str, Any], name: str) -> Any:
    """The config of an argument of a checkpoint's stage, such as a network, to sample with it.

    A network in the checkpoint needs no pretrained weights. A frozen stage or network has the path
    at which it was found, and the recorded hash.

    Raises:
        FileNotFoundError: if a frozen stage is missing.
    """
    config = content["stage"][name]
    if any(key.startswith(f"{name}.") for key in content["state_dict"]):
        config = drop_weight_paths(config)
    if (recorded := content["frozen"].get(name)) is not None:
        source = str(find_frozen(path, name, recorded))
        config = {**config, "source": source, "sha256": recorded["sha256"]}
    return config


def drop_weight_paths(node: Any) -> Any:
    """A network's config without pretrained weights, as the checkpoint contains trained ones."""
    if not isinstance(node, dict):
        return node
    return {k: None if k == "weights" else drop_weight_paths(v) for k, v in node.items()}


def find_frozen(path: Path, name: str, recorded: dict[str, str]) -> Path:
    """The checkpoint or model of a frozen stage that the checkpoint at ``path`` was trained with.

    Its path is recorded relative to the run's folder, so that runs can be moved together, and as an
    absolute path, so that the run at ``path`` can be moved alone.

    Raises:
        FileNotFoundError: if it exists at neither path.
    """
    run_dir = path.absolute().parent.parent
    candidates = [Path(os.path.normpath(run_dir / recorded["path"]))]
    candidates += [Path(recorded["absolute_path"])] if "absolute_path" in recorded else []
    frozen = next((candidate for candidate in candidates if candidate.exists()), None)
    if frozen is None:
        raise FileNotFoundError(f"{path} needs its {name} at {candidates[0]}, which does not exist")
    return frozen
