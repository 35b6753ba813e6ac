"""Checkpoints in parts: a folder to which each process writes what it holds.

Tensors lie in safetensors files, written and read by torch's distributed checkpoints, and so can be
read by any number of processes; everything else, in ``rest.pt``. Neither runs code. (torch's own
layout of such folders keeps a pickle.)
"""

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

REST = "rest.pt"
SEPARATOR = "|"  # parameters' names have dots
TreePath = tuple[str | int, ...]
Template = Callable[[TreePath, torch.Size, torch.dtype], Tensor]


def write_sharded(
    checkpoint: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint, of which each process has a part of the tensors; all have to call it.

    Args:
        checkpoint: nested dicts and lists of tensors, which may be sharded, and plain values.
        folder: a new one; one that is there is removed.
        group: by which the processes talk; None is that of training.

    Raises:
        OSError: if the disk is full or fails.
    """
    tensors: dict[str, Tensor] = {}
    rest = _split_tensors(checkpoint, (), tensors)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    failed: list[OSError | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            _begin(folder, {"rest": rest, "tensors": shapes})
        except OSError as error:
            failed = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(failed, group=group)
    if failed[0] is not None:
        raise failed[0]
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # which is not an Exception
        raise OSError(_reason(error)) from error


def _begin(folder: Path, content: dict[str, Any]) -> None:
    """An empty folder but for what is not a tensor."""
    if folder.is_dir():  # left by a run that was killed
        shutil.rmtree(folder)
    folder.unlink(missing_ok=True)
    folder.mkdir(parents=True)
    with (folder / REST).open("wb") as file:
        torch.save(content, file)


def _reason(error: CheckpointException) -> str:
    """What the first process that failed says."""
    first = next(iter(error.failures.values()))[0]
    return getattr(first, "strerror", None) or str(first)


def read_sharded(
    folder: Path, template: Template | None = None, *, skip: Sequence[str] = ()
) -> dict[str, Any]:
    """The contents of a checkpoint in parts.

    Args:
        folder: as written by ``write``, by any number of processes.
        template: path of a tensor in the checkpoint, its whole shape and type -> a tensor to read
            into, which may be sharded; None reads whole tensors, in one process.
        skip: top-level entries whose tensors are not read; they stay None.

    Raises:
        OSError: if a file is missing.
        ValueError: if a tensor is.
    """
    reader = HuggingFaceStorageReader(str(folder))
    noted = torch.load(folder / REST, map_location="cpu", weights_only=True)
    there = reader.read_metadata().state_dict_metadata
    whole = [name for name, shape in noted["tensors"].items() if _is_whole(there.get(name), shape)]
    if missing := sorted(noted["tensors"].keys() - set(whole)):
        raise ValueError(f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}")
    tensors = {}
    wanted = [n for n in noted["tensors"] if n.partition(SEPARATOR)[0] not in skip]
    for name in wanted:
        path, found = tuple(_key(step) for step in name.split(SEPARATOR)), there[name]
        size, dtype = found.size, found.properties.dtype  # type: ignore[union-attr]
        tensors[name] = template(path, size, dtype) if template else torch.empty(size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as wanted
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=template is None)
        except CheckpointException as error:
            raise OSError(f"{folder} cannot be read: {_reason(error)}") from error
    checkpoint = noted["rest"]
    for name, tensor in tensors.items():
        _insert_tensor(checkpoint, [_key(step) for step in name.split(SEPARATOR)], tensor)
    return checkpoint


def _is_whole(found: Any, shape: list[int]) -> bool:
    """Whether the parts of a tensor that are there make all of it."""
    if found is None or list(found.size) != shape:
        return False
    return sum(math.prod(chunk.sizes) for chunk in found.chunks) >= math.prod(shape)


def is_sharded(path: Path) -> bool:
    """Whether a path is a checkpoint in parts."""
    return (path / REST).is_file()


def _split_tensors(node: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """A copy of a tree without its tensors, which go into ``tensors`` by their path."""
    if isinstance(node, Tensor):
        tensors[SEPARATOR.join(path)] = node
        return None
    if isinstance(node, dict):
        return {k: _split_tensors(v, (*path, _step(k)), tensors) for k, v in node.items()}
    if isinstance(node, list | tuple):
        kept = [_split_tensors(v, (*path, _step(i)), tensors) for i, v in enumerate(node)]
        return kept if isinstance(node, list) else tuple(kept)
    return node


def _insert_tensor(node: Any, path: Sequence[str | int], tensor: Tensor) -> None:
    """Put a tensor to the place that was left empty for it."""
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = tensor


def _step(key: str | int) -> str:
    return f"#{key}" if isinstance(key, int) else key


def _key(step: str) -> str | int:
    return int(step[1:]) if step.startswith("#") else step
