"""Single-file checkpoints, for every strategy but FSDP; reads sharded checkpoints too."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.async_save import save_or_defer
from wuerstchen_pl.io import atomic


class SingleFileCheckpointIO(CheckpointIO):
    """Writes directly to disk; Lightning's own plugin first makes a copy in memory."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a file, or leave it to a ``DeferredSave``; without fsync and hash.

        Raises:
            OSError: if the disk is full or fails.
        """

        def write(content: dict[str, Any], group: object) -> None:
            # Open it in Python, whose errors tell what is wrong with the disk; torch's do not.
            with Path(path).open("wb") as file:
                torch.save(content, file)

        save_or_defer(checkpoint, write, storage_options)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a single-file or sharded checkpoint without running code from it."""
        return load.read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, a file or a folder."""
        atomic.remove(Path(path))
