"""A trained stage, from a run or from a model of any format."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.utils import get_class
from torch import nn

from wuerstchen_pl.checkpointing.allowed import COMPRESSOR_ONLY, stage_class, stage_name
from wuerstchen_pl.checkpointing.load import (
    build_stage,
    find_checkpoint,
    find_frozen,
    read_checkpoint,
)
from wuerstchen_pl.formats.detection import find_format
from wuerstchen_pl.formats.hub import resolve_source
from wuerstchen_pl.formats.model import DIFFNEXT, PAELLA, VQGAN, Part, build_network
from wuerstchen_pl.formats.pretrained import resolve_weights
from wuerstchen_pl.formats.registry import read_model
from wuerstchen_pl.formats.sources import check_sha256, checked_source
from wuerstchen_pl.formats.stage_parts import STAGE_PARTS, compressor_of, parts_of_stage
from wuerstchen_pl.io import atomic
from wuerstchen_pl.models.fingerprint import network_fingerprint
from wuerstchen_pl.models.meta import is_building_on_meta
from wuerstchen_pl.models.text import TextEncoder

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

FROM_MODELS = ("a", "b")
"""The stages that other stages use frozen, which are built from models too."""
TARGETS = {
    VQGAN: "wuerstchen_pl.stages.a.StageA",
    DIFFNEXT: "wuerstchen_pl.stages.b.StageB",
    PAELLA: "wuerstchen_pl.stages.b_tokens.TokenStageB",
}
"""The network that decodes -> the stage that it is of."""


def load_stage(
    *,
    source: str | Path,
    stage: str,
    ema: bool = True,
    sha256: str | None = None,
    compressor: str | None = None,
) -> "Stage":
    """A trained stage with its frozen stages, ready to sample.

    Args:
        source: a run of this stage or of one that was trained with it, a checkpoint, or for Stages
            A and B a model of any format or a hub id.
        stage: the expected stage: ``a``, ``b``, ``c`` or ``ldm``.
        ema: use the EMA weights of a run; False uses its raw weights.
        sha256: the recorded hash, of a checkpoint or of a model's weights in any format; another
            one is refused.
        compressor: a model whose compressor Stage B uses, for a source without one.

    Raises:
        FileNotFoundError: if the source is missing, or one of its networks.
        ValueError: if it is damaged, contains another stage or has another hash, or if a frozen
            stage of a run has changed.
    """
    path = _find(source, stage)
    if _is_model(path, stage):
        trained = _from_model(path, stage, sha256, compressor)
    else:
        trained = _from_checkpoint(path, stage, ema, sha256)
    if stage in FROM_MODELS:
        _record_encoder(trained)
    return trained


def load_compressor(*, source: str | Path, sha256: str | None = None) -> "Stage":
    """The compressor of a run or of a model of any format, as a Stage B without its denoiser.

    Args:
        source: a run, a checkpoint, a model or a hub id.
        sha256: the recorded hash of the compressor's weights; others are refused.

    Raises:
        FileNotFoundError: if the source is missing.
        ValueError: if it has no compressor, is damaged or has other weights.
    """
    path = resolve_weights(source)
    part = _compressor(path)
    network = build_network(part).float()
    checked = checked_source(path, [network], sha256)
    stage: Stage = get_class(COMPRESSOR_ONLY)(compressor=network)
    config = {"_target_": COMPRESSOR_ONLY, "compressor": dict(part.config)}
    stage.record_provenance(config=config, source=checked)
    _record_encoder(stage)
    return stage.eval()


def _record_encoder(stage: "Stage") -> None:
    if not is_building_on_meta():
        stage.provenance.encoder = network_fingerprint(stage.encoding)


def _find(source: str | Path, stage: str) -> Path:
    """The model of a source, or the newest checkpoint of a run."""
    try:
        path = resolve_source(str(source))
        return path if _is_model(path, stage) else find_checkpoint(path)
    except FileNotFoundError as error:
        key = f"paths.stage_{stage}" if stage in FROM_MODELS else "model"
        raise FileNotFoundError(
            f"{error}; train Stage {stage.upper()} first "
            f"(python -m wuerstchen_pl.train stage={stage}), or set {key}= to its run"
        ) from None


def _is_model(path: Path, stage: str) -> bool:
    return stage in FROM_MODELS and find_format(path) is not None


def _from_checkpoint(path: Path, name: str, ema: bool, sha256: str | None) -> "Stage":
    check_sha256(path, atomic.sha256(path), sha256)  # before a changed file is interpreted
    content = read_checkpoint(path, tensors="ema" if ema else "raw")
    trained = stage_name(content["stage"])
    if trained == name:
        return build_stage(path, content, ema=ema)
    for frozen, recorded in content["frozen"].items() if name < trained else ():
        if frozen in ("stage_a", "stage_b"):
            below = find_frozen(path, frozen, recorded)
            compressor = content["stage"][frozen].get("compressor")
            return load_stage(source=below, stage=name, compressor=compressor)
    raise ValueError(
        f"{path} contains stage={trained}, but stage={name} is needed; "
        f"use a checkpoint of stage={name}"
    )


def _from_model(path: Path, name: str, recorded: str | None, compressor: str | None) -> "Stage":
    parts = dict(read_model(str(path)).parts)
    if name == "b" and compressor is not None and "compressor" not in parts:
        parts |= {"compressor": _compressor(compressor)}
    parts = parts_of_stage(parts, name, path)
    networks = {key: build_network(part).float() for key, part in parts.items()}
    return _build(parts, networks, name, checked_source(path, networks.values(), recorded)).eval()


def _compressor(source: str | Path) -> Part:
    return compressor_of(read_model(str(source)), source)


def _build(
    parts: Mapping[str, Part], networks: Mapping[str, nn.Module], name: str, source: atomic.Source
) -> "Stage":
    """Stage A or B with the networks of a model, and the config that it would have in a run."""
    arguments: dict[str, Any] = {}
    decoder = parts["vqgan" if name == "a" else "decoder"].config["_target_"]
    config: dict[str, Any] = {"_target_": TARGETS[decoder]}
    expected = inspect.signature(stage_class(config)).parameters
    for attribute, part in STAGE_PARTS[name].items():
        if part not in networks or attribute not in expected:
            continue
        arguments[attribute], config[attribute] = networks[part], dict(parts[part].config)
        if part == "text_encoder":
            cast(TextEncoder, networks[part]).source = source
            if (files := parts[part].tokenizer) is not None:
                config[attribute]["tokenizer"] = str(files)
    if name == "b":
        arguments["stage_a"] = _build(parts, networks, "a", source)
    stage: Stage = stage_class(config)(**arguments)
    stage.record_provenance(config=config, source=source)
    return stage
