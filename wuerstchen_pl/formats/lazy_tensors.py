"""Tensors that are read when they are wanted, and written one by one.

A conversion holds one tensor at a time; what a file holds is never all in memory, but for the
authors' pickles on the way out, which torch writes at once.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

HEADER_BYTES = 8
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls the types."""
TYPES = {name: dtype for dtype, name in NAMES.items()}


class LazyTensor(NamedTuple):
    """A tensor to be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def in_memory(tensor: Tensor) -> LazyTensor:
    """A tensor that is in memory already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, or of the shards that a ``*.index.json`` names.

    Raises:
        ValueError: if a file is damaged, or a shard lacks what the index says it has.
        FileNotFoundError: if a shard is missing.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {
                name: LazyTensor(
                    tuple(part.get_shape()), TYPES[part.get_dtype()], _loader(path, name)
                )
                for name, part in slices.items()
            }
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    return found


def _loader(path: Path, name: str) -> Callable[[], Tensor]:
    def load() -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    return load


def _read_shards(index: Path) -> dict[str, LazyTensor]:
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(str(shard).endswith(".safetensors") for shard in shard_of.values()):
            raise ValueError("its shards are not safetensors files")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of shards: {error}") from error
    shards: dict[str, dict[str, LazyTensor]] = {}
    for name in sorted(set(shard_of.values())):
        path = index.parent / Path(name).name  # a name with folders would lead elsewhere
        if not path.is_file():
            raise FileNotFoundError(f"{index} names {path.name}, which is not there")
        shards[name] = read_safetensors(path)
    lost = [name for name, shard in shard_of.items() if name not in shards[shard]]
    if lost:
        raise ValueError(f"{index} names tensors that its shards lack: {', '.join(sorted(lost))}")
    held_by = {name for shard in shards.values() for name in shard}
    if unnamed := sorted(held_by - shard_of.keys()):
        raise ValueError(f"{index} does not name tensors of its shards: {', '.join(unnamed)}")
    return {name: shards[shard][name] for name, shard in shard_of.items()}


def read_pickle(path: Path) -> dict[str, Any]:
    """A ``.pt`` file of tensors and plain values; it runs no code, and reads tensors when used.

    Raises:
        ValueError: if it is damaged, or wants more than that.
    """
    for mmap in (True, False):  # files of the old format cannot be mapped
        with contextlib.suppress(Exception):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            if isinstance(content, dict):
                return content
    raise ValueError(
        f"{path} is damaged, or holds more than tensors and plain values; it is not loaded"
    )


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors one by one: a header with their places, then their bytes.

    Raises:
        OSError: if the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # by falling alignment, as safetensors itself does
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in ordered:
        shape, dtype, _ = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(HEADER_BYTES, "little") + text)
        for name in ordered:
            for part in _bytes(tensors[name].load()):
                file.write(part)


def _bytes(tensor: Tensor) -> Iterator[Any]:
    flat = tensor.detach().cpu().contiguous().flatten()
    if len(flat):
        yield flat.view(torch.uint8).numpy().data
