"""Frozen networks with the weights of a run or of a model of any format."""

from pathlib import Path
from typing import Literal, cast

from wuerstchen_pl.checkpointing.load import find_checkpoint
from wuerstchen_pl.formats.hub import resolve_source
from wuerstchen_pl.formats.model import build_network
from wuerstchen_pl.formats.registry import read_model
from wuerstchen_pl.formats.run import is_run
from wuerstchen_pl.formats.sources import checked_source
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
