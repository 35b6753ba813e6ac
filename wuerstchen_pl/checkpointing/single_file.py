"""Checkpoints in one file, as every strategy but FSDP writes them; read in either form."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.async_save import save_or_defer
from wuerstchen_pl.io import atomic


class SingleFileCheckpointIO(CheckpointIO):
    """Writes straight to the disk; Lightning's own makes a copy in memory first."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a file, or leave that to a ``DeferredSave``; not durable yet, and without a hash.

        Raises:
            OSError: if the disk is full or fails.
        """

        def write(content: dict[str, Any], group: object) -> None:
            # A file of Python's: its errors say what is wrong with the disk, torch's do not.
            with Path(path).open("wb") as file:
                torch.save(content, file)

        save_or_defer(checkpoint, write, storage_options)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, or a folder that several processes wrote; runs no code of it."""
        return load.read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove it."""
        atomic.remove(Path(path))
