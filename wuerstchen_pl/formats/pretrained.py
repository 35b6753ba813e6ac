"""Frozen networks with the weights of a run or of a model of any format."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast

from torch import nn

from wuerstchen_pl.checkpointing.load import find_checkpoint
from wuerstchen_pl.formats.model import build_network
from wuerstchen_pl.formats.registry import read_model, resolve_source
from wuerstchen_pl.formats.run import is_run
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.fingerprint import weights_fingerprint
from wuerstchen_pl.models.meta import is_building_on_meta
from wuerstchen_pl.models.pretrained import Pretrained


def load_network(
    *,
    source: str | Path,
    part: Literal["prior", "prior_text_encoder", "decoder", "compressor", "text_encoder"],
    sha256: str | None = None,
) -> Pretrained:
    """A network of a run or of a model of any format, frozen, in float32.

    Within ``on_meta`` no weights are read, as by the other functions that load networks.

    Args:
        source: a run, a checkpoint, a model or a hub id.
        part: name of the network.
        sha256: recorded hash of its weights; others are refused.

    Raises:
        FileNotFoundError: if there is no such run or model.
        ValueError: if it lacks the network, is damaged or has other weights.
    """
    path = resolve_weights(source)
    parts = read_model(str(path)).parts
    if part not in parts:
        raise ValueError(f"{source} has no {part}; use a model that has one")
    network = cast(Pretrained, build_network(parts[part]).float())
    words = getattr(network, "words", ())
    network.source = checked_source(path, [network, *words], sha256)
    tokenizer = parts[part].tokenizer
    network.arguments = {
        **parts[part].config,
        **({"tokenizer": str(tokenizer)} if tokenizer else {}),
    }
    return network


def resolve_weights(source: str | Path) -> Path:
    """The newest checkpoint of a run, which may be trained further; other sources as they are.

    Raises:
        FileNotFoundError: if the source is missing.
    """
    path = resolve_source(str(source))
    return find_checkpoint(path) if is_run(path) else path


def checked_source(path: Path, networks: Iterable[nn.Module], recorded: str | None) -> Source:
    """A model, with the hash of the weights that were read from it; "" if none were.

    Raises:
        ValueError: see ``check_sha256``.
    """
    if is_building_on_meta():
        return Source(path=str(path), sha256="")
    actual = weights_fingerprint(networks)
    check_sha256(path, actual, recorded)
    return Source(path=str(path), sha256=actual)


def check_sha256(path: Path, actual: str, recorded: str | None) -> None:
    """Refuse weights that have changed since a training; ``recorded`` is None in a new one.

    Raises:
        ValueError: with both hashes.
    """
    if recorded is not None and actual != recorded:
        raise ValueError(
            f"{path} had sha256 {recorded[:12]} in training, which has changed to {actual[:12]}; "
            "restore the old weights, or train again"
        )
