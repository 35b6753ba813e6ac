"""Tensors that are read on demand and written one by one.

A conversion has one tensor in memory at a time, except when it writes upstream pickles, which
torch saves as a whole.
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

from wuerstchen_pl.checkpointing.finite import check_finite

HEADER_BYTES = 8
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""dtype -> its name in safetensors."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class LazyTensor(NamedTuple):
    """Shape and dtype of a tensor, and a function that reads it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def in_memory(tensor: Tensor) -> LazyTensor:
    """Wrap a tensor that is already in memory."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def checked(lazy: LazyTensor, name: str, where: str) -> LazyTensor:
    """The same tensor, whose loading fails if it has values that are not finite."""

    def load() -> Tensor:
        tensor = lazy.load()
        check_finite({name: tensor}, where)
        return tensor

    return lazy._replace(load=load)


def read_small_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its header.

    Raises:
        ValueError: if it is damaged, or has values that are not finite.
    """
    try:
        with safe_open(path, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    check_finite(tensors, str(path))
    return tensors, metadata


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, or of the shards that a JSON index lists.

    Raises:
        ValueError: if a file is damaged, or the index does not match the shards.
        FileNotFoundError: if a shard is missing.
    """
    if path.suffix == ".json":
        return _read_shards(path)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: LazyTensor(
                    tuple(part.get_shape()), DTYPES[part.get_dtype()], _loader(path, name)
                )
                for name, part in slices.items()
            }
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
    return tensors


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
        if not shard_of:
            raise ValueError("its weight_map is empty")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not a shard index: {error}") from error
    shards: dict[str, dict[str, LazyTensor]] = {}
    for name in sorted(set(shard_of.values())):
        path = (
            index.parent / Path(name).name
        )  # drop folders: an untrusted name must not leave this one
        if not path.is_file():
            raise FileNotFoundError(
                f"{index} lists {path.name}, which does not exist; add the shard"
            )
        shards[name] = read_safetensors(path)
    missing = [name for name, shard in shard_of.items() if name not in shards[shard]]
    if missing:
        raise ValueError(
            f"{index} lists tensors that its shards lack: {', '.join(sorted(missing))}"
        )
    stored = {name for shard in shards.values() for name in shard}
    if unlisted := sorted(stored - shard_of.keys()):
        raise ValueError(f"{index} does not list tensors of its shards: {', '.join(unlisted)}")
    return {name: shards[shard][name] for name, shard in shard_of.items()}


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a ``.pt`` file of tensors and plain values, memory-mapped and without running code.

    Raises:
        ValueError: if it is damaged, or contains other objects.
    """
    for mmap in (True, False):  # legacy files cannot be memory-mapped
        with contextlib.suppress(Exception):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            if isinstance(content, dict):
                return content
    raise ValueError(
        f"{path} was not loaded: it is damaged or contains more than tensors and plain values; use "
        "another file"
    )


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors one by one: a header with their byte offsets, then their data.

    Raises:
        OSError: if the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    # by decreasing item size, as safetensors does
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in ordered:
        shape, dtype, _ = tensors[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
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
