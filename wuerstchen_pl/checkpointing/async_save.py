"""Checkpoints that are written after they were handed over: training need not wait for the disk."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

WriteCheckpoint = Callable[[dict[str, Any], ProcessGroup | None], None]
"""Writes a checkpoint; processes that share the work talk by the group, if one is given."""


class DeferredSave:
    """What ``trainer.save_checkpoint`` takes as ``storage_options``, so as to write nothing yet.

    Args:
        copy_to_host: keep a copy in the host's memory, as training changes the tensors meanwhile.
    """

    def __init__(self, *, copy_to_host: bool) -> None:
        self.copy_to_host = copy_to_host
        self._work: Callable[[ProcessGroup | None], None] = lambda group: None

    def record(self, write: WriteCheckpoint, checkpoint: dict[str, Any]) -> None:
        """Note what there is to do."""
        self._work = partial(write, _copy_to_host(checkpoint) if self.copy_to_host else checkpoint)

    def write(self, group: ProcessGroup | None) -> None:
        """Do it.

        Raises:
            OSError: if the disk is full or fails.
        """
        self._work(group)


def save_or_defer(
    checkpoint: dict[str, Any], write: WriteCheckpoint, deferred: DeferredSave | None
) -> None:
    """Write now, unless it is to be put off."""
    if deferred is None:
        write(checkpoint, None)
    else:
        deferred.record(write, checkpoint)


def _copy_to_host(node: Any) -> Any:
    """A copy of a tree; its tensors, sharded or not, lie in the host's memory."""
    if isinstance(node, dict):
        return {key: _copy_to_host(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_copy_to_host(value) for value in node)
    return node.detach().to("cpu", copy=True) if isinstance(node, Tensor) else node
