"""Checkpoints that are written after they were handed over: training need not wait for the disk."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

Write = Callable[[dict[str, Any], ProcessGroup | None], None]
"""Writes a checkpoint; processes that share the work talk by the group, if one is given."""


class PutOff:
    """What ``trainer.save_checkpoint`` takes as ``storage_options``, so as to write nothing yet.

    Args:
        copied: keep a copy in the host's memory, as training changes the tensors meanwhile.
    """

    def __init__(self, *, copied: bool) -> None:
        self.copied = copied
        self._work: Callable[[ProcessGroup | None], None] = lambda group: None

    def take(self, write: Write, checkpoint: dict[str, Any]) -> None:
        """Note what there is to do."""
        self._work = partial(write, _copy(checkpoint) if self.copied else checkpoint)

    def do(self, group: ProcessGroup | None) -> None:
        """Do it.

        Raises:
            OSError: if the disk is full or fails.
        """
        self._work(group)


def hand_over(checkpoint: dict[str, Any], write: Write, put_off: PutOff | None) -> None:
    """Write now, unless it is to be put off."""
    if put_off is None:
        write(checkpoint, None)
    else:
        put_off.take(write, checkpoint)


def _copy(node: Any) -> Any:
    """A copy of a tree; its tensors, sharded or not, lie in the host's memory."""
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_copy(value) for value in node)
    return node.detach().to("cpu", copy=True) if isinstance(node, Tensor) else node
