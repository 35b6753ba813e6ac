"""Where frozen weights came from: they must not change after a training with them."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.fingerprint import weights_fingerprint
from wuerstchen_pl.models.meta import is_building_on_meta


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
