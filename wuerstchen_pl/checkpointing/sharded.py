"""Sharded checkpoints: a folder to which each process writes its shards.

Tensors are in safetensors files, written and read by ``torch.distributed.checkpoint``, so that any
number of processes can read them; everything else is in ``rest.pt``. Reading runs no code. (The
default format of ``torch.distributed.checkpoint`` contains a pickle.)
"""

import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from wuerstchen_pl.plural import plural

if TYPE_CHECKING:
    from torch.distributed.checkpoint.api import CheckpointException

REST = "rest.pt"
SEPARATOR = "|"  # not a dot, as parameter names contain dots
TreePath = tuple[str | int, ...]
Selection = Callable[[Iterable[TreePath]], Set[TreePath]]
Template = Callable[[TreePath, torch.Size, torch.dtype], Tensor]


def write_sharded(
    checkpoint: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint whose tensors may be sharded; every process must call it.

    Args:
        checkpoint: nested dicts and lists of tensors, which may be sharded, and plain values.
        folder: the folder to create; an existing one is replaced.
        group: process group for communication; None is the default group.

    Raises:
        OSError: if the disk is full or fails.
    """
    tensors: dict[str, Tensor] = {}
    rest = _split_tensors(checkpoint, (), tensors)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    failure: list[OSError | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            _create_folder(folder, {"rest": rest, "tensors": shapes})
        except OSError as error:
            failure = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(failure, group=group)
    if failure[0] is not None:
        raise failure[0]
    # takes 0.8 s, which programs that read a single file do without
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # a BaseException, not an Exception
        raise OSError(_reason(error)) from error


def _create_folder(folder: Path, content: dict[str, Any]) -> None:
    """Create the folder with ``rest.pt`` only."""
    if folder.is_dir():  # left by a run that was killed
        shutil.rmtree(folder)
    folder.unlink(missing_ok=True)
    folder.mkdir(parents=True)
    with (folder / REST).open("wb") as file:
        torch.save(content, file)


def _reason(error: "CheckpointException") -> str:
    """The error message of the first process that failed."""
    first = next(iter(error.failures.values()))[0]
    return getattr(first, "strerror", None) or str(first)


def read_sharded(
    folder: Path, template: Template | None = None, *, select: Selection = frozenset
) -> dict[str, Any]:
    """The contents of a sharded checkpoint.

    Args:
        folder: as written by ``write_sharded`` with any number of processes.
        template: (path in the checkpoint, full shape, dtype) -> the tensor to read into, which may
            be sharded; None reads full tensors, in one process.
        select: paths of all tensors -> those to read; the others stay None.

    Raises:
        OSError: if a file is missing.
        ValueError: if a tensor is missing or incomplete.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    reader = dcp.HuggingFaceStorageReader(str(folder))
    content = torch.load(folder / REST, map_location="cpu", weights_only=True)
    stored = reader.read_metadata().state_dict_metadata
    complete = {
        name for name, shape in content["tensors"].items() if _is_complete(stored.get(name), shape)
    }
    if missing := sorted(content["tensors"].keys() - complete):
        raise ValueError(
            f"{folder} lacks {plural(len(missing), 'tensor')}, the first is {missing[0]}"
        )
    tensors = {}
    paths = {tuple(map(_key, name.split(SEPARATOR))): name for name in content["tensors"]}
    selected = select(paths)
    for path, name in paths.items():
        if path not in selected:
            continue
        metadata = stored[name]
        size, dtype = metadata.size, metadata.properties.dtype  # type: ignore[union-attr]
        tensors[name] = template(path, size, dtype) if template else torch.empty(size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
        try:
            if tensors:
                dcp.load(tensors, storage_reader=reader, no_dist=template is None)
        except CheckpointException as error:
            raise OSError(f"{folder} cannot be read: {_reason(error)}") from error
    checkpoint = content["rest"]
    for name, tensor in tensors.items():
        _insert_tensor(checkpoint, [_key(step) for step in name.split(SEPARATOR)], tensor)
    return checkpoint


def _is_complete(metadata: Any, shape: list[int]) -> bool:
    """Whether the stored chunks of a tensor cover all of its elements."""
    if metadata is None or list(metadata.size) != shape:
        return False
    return sum(math.prod(chunk.sizes) for chunk in metadata.chunks) >= math.prod(shape)


def is_sharded(path: Path) -> bool:
    """Whether a path is a sharded checkpoint."""
    return (path / REST).is_file()


def _split_tensors(node: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """A copy of nested containers with None for each tensor; adds those to ``tensors`` by path."""
    if isinstance(node, Tensor):
        tensors[SEPARATOR.join(path)] = node
        return None
    if isinstance(node, dict):
        return {k: _split_tensors(v, (*path, _step(k)), tensors) for k, v in node.items()}
    if isinstance(node, list | tuple):
        items = [_split_tensors(v, (*path, _step(i)), tensors) for i, v in enumerate(node)]
        return items if isinstance(node, list) else tuple(items)
    return node


def _insert_tensor(node: Any, path: Sequence[str | int], tensor: Tensor) -> None:
    """Put a tensor back at its path."""
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = tensor


def _step(key: str | int) -> str:
    return f"#{key}" if isinstance(key, int) else key


def _key(step: str) -> str | int:
    return int(step[1:]) if step.startswith("#") else step
