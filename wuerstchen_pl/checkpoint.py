"""Checkpoints of runs: find one, check it, and build the stage that it holds.

A checkpoint may come from a stranger. It is read with ``weights_only=True``, and the classes that
its config names are built only if they stand in ``BUILDABLE``.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import torch

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

BUILDABLE = frozenset(
    f"wuerstchen_pl.{name}"
    for name in (
        "checkpoint.load_stage",
        "data.datamodule.ImageTextDataModule",
        "data.openmoji.OpenMoji",
        "data.shards.ShardSource",
        "models.compressor.ConvBackbone",
        "models.compressor.EfficientNet",
        "models.compressor.SemanticCompressor",
        "models.diffnext.DiffNeXt",
        "models.discriminator.Discriminator",
        "models.prior.Prior",
        "models.text.TextEncoder",
        "models.vqgan.VQGAN",
        "stages.a.StageA",
        "stages.b.StageB",
        "stages.c.StageC",
    )
)


def find(run: str | Path) -> Path:
    """The newest checkpoint of a run's folder, or ``run`` itself if it is a file.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(run)
    if path.is_file():
        return path
    found = sorted(path.glob("checkpoints/step*.ckpt"))
    if not found:
        raise FileNotFoundError(f"{path} holds no checkpoint")
    return found[-1]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, or -1 where it bears none."""
    match = re.fullmatch(r"step(\d+)", path.stem)
    return int(match[1]) if match else -1


def read(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint; runs no code of it.

    Raises:
        ValueError: if the file is damaged, or wants more than tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no readable checkpoint, or is damaged: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("stage"), dict):
        raise ValueError(f"{path} is no checkpoint of a wuerstchen_pl run: it names no stage")
    return content


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build(config: Any) -> Any:
    """Instantiate a config out of a checkpoint or a run, if all that it names is allowed.

    Raises:
        ValueError: for a ``_target_`` outside of ``BUILDABLE``, or an interpolation.
    """
    _refuse_foreign(config)
    return hydra.utils.instantiate(config, _convert_="all")


def _refuse_foreign(node: Any) -> None:
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None and target not in BUILDABLE:
            raise ValueError(f"_target_={target!r} in a checkpoint is not one of this package's")
        for value in node.values():
            _refuse_foreign(value)
    elif isinstance(node, list):
        for value in node:
            _refuse_foreign(value)
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
    try:
        path = find(run)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; train Stage {stage.upper()} first "
            f"(python -m wuerstchen_pl.train stage={stage}), or name its run with "
            f"{'paths.stage_' + stage if stage != 'c' else 'model'}="
        ) from None
    content = read(path)
    config = dict(content["stage"])
    _refuse_foreign({k: v for k, v in config.items() if k not in _training_only(config)})
    held = str(config.get("_target_", "")).rsplit(".", 1)[-1]
    if held != f"Stage{stage.upper()}":
        raise ValueError(f"{path} holds {held or 'no stage'}, where Stage{stage.upper()} is needed")
    for name in _training_only(config):
        config.pop(name, None)
    for name, named in content["frozen"].items():
        config[name] = {**config[name], "run": str(_follow(path, name, named))}
    module: Stage = build(config)
    state = dict(content["state_dict"])
    if ema:
        state |= content["ema"]["shadow"]
    module.load_state_dict(state)
    module.ema.load_state_dict({**content["ema"], "shadow": {}})
    module.config = content["stage"]
    module.source = {"path": str(path), "sha256": sha256(path)}
    return module.eval()


def _training_only(config: dict[str, Any]) -> tuple[str, ...]:
    """Constructor arguments of the stage that ``config`` names which sampling does without."""
    if config.get("_target_") not in BUILDABLE:
        raise ValueError(f"_target_={config.get('_target_')!r} is no stage of this package")
    return hydra.utils.get_class(config["_target_"]).TRAINING_ONLY  # type: ignore[attr-defined]


def _follow(path: Path, name: str, named: dict[str, str]) -> Path:
    """Where the frozen stage of the checkpoint at ``path`` lies: beside its run, or as named."""
    run = path.parent.parent
    beside = Path(os.path.normpath(run / named["path"]))
    found = beside if beside.is_file() else Path(named["path"])
    if not found.is_file():
        raise FileNotFoundError(f"{path} needs its {name} {beside}, which is not there")
    if sha256(found) != named["sha256"]:
        raise ValueError(
            f"{path} was trained over {found} with sha256 {named['sha256'][:12]}, and that file "
            f"has changed to {sha256(found)[:12]}; put the old one back or train again"
        )
    return found
