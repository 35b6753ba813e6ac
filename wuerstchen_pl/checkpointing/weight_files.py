"""Files of frozen networks' weights, such as CLIP's: a checkpoint has their hashes."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from wuerstchen_pl.io import atomic
from wuerstchen_pl.io.atomic import Source


def weight_files(frozen: Mapping[str, nn.Module]) -> dict[str, Source]:
    """Paths and hashes of the weight files of frozen networks, such as CLIP's."""
    paths = {name: getattr(part, "weights", None) for name, part in frozen.items()}
    return {
        name: {"path": str(path), "sha256": atomic.sha256(Path(path))}
        for name, path in paths.items()
        if path is not None and os.path.isfile(path)
    }


def check_weight_files(frozen: Mapping[str, nn.Module], recorded: Mapping[str, Source]) -> None:
    """Refuse frozen weights that differ from those recorded in a checkpoint.

    Raises:
        ValueError: naming the file and both hashes.
    """
    for name, source in weight_files(frozen).items():
        expected = recorded.get(name, source)["sha256"]
        if source["sha256"] != expected:
            raise ValueError(
                f"stage.{name}.weights={source['path']} has sha256 {source['sha256'][:12]}, but "
                f"the checkpoint was trained with {expected[:12]}; restore that file"
            )
