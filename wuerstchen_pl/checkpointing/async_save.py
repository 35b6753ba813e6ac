"""Deferred writing of checkpoints, so that training does not wait for the disk."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

WriteCheckpoint = Callable[[dict[str, Any], ProcessGroup | None], None]
"""Writes a checkpoint; processes that share the work communicate in the group, if any."""


class DeferredSave:
    """Passed to ``trainer.save_checkpoint`` as ``storage_options`` to defer the writing.

    Args:
        copy_to_host: copy tensors to host memory, as training changes them before they are written.
    """

    def __init__(self, *, copy_to_host: bool) -> None:
        self.copy_to_host = copy_to_host
        self._write: Callable[[ProcessGroup | None], None] = lambda group: None

    def record(self, write: WriteCheckpoint, checkpoint: dict[str, Any]) -> None:
        """Set the checkpoint to write, and the function that writes it."""
        self._write = partial(write, _copy_to_host(checkpoint) if self.copy_to_host else checkpoint)

    def write(self, group: ProcessGroup | None) -> None:
        """Write the recorded checkpoint.

        Raises:
            OSError: if the disk is full or fails.
        """
        self._write(group)


def save_or_defer(
    checkpoint: dict[str, Any], write: WriteCheckpoint, deferred: DeferredSave | None
) -> None:
    """Write now, or record the checkpoint in ``deferred``."""
    if deferred is None:
        write(checkpoint, None)
    else:
        deferred.record(write, checkpoint)


def _copy_to_host(node: Any) -> Any:
    """A copy of nested containers with all tensors, sharded or not, in host memory."""
    if isinstance(node, dict):
        return {key: _copy_to_host(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_copy_to_host(value) for value in node)
    return node.detach().to("cpu", copy=True) if isinstance(node, Tensor) else node
