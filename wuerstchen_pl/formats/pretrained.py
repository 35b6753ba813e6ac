"""Frozen networks with the weights of a run or of a model of any format."""

from pathlib import Path
from typing import Literal, cast

from wuerstchen_pl.checkpointing.load import find_checkpoint
from wuerstchen_pl.formats.model import build_network
from wuerstchen_pl.formats.registry import read_model, resolve_source
from wuerstchen_pl.formats.run import is_run
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.fingerprint import weights_fingerprint
from wuerstchen_pl.models.pretrained import Pretrained


def load_network(
    *,
    source: str | Path,
    part: Literal["prior", "prior_text_encoder", "decoder", "compressor", "text_encoder"],
    sha256: str | None = None,
) -> Pretrained:
    """A network of a run or of a model of any format, frozen, in float32.

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
    actual = weights_fingerprint([network, *getattr(network, "words", ())])
    check_sha256(path, actual, sha256)
    network.source = Source(path=str(path), sha256=actual)
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
