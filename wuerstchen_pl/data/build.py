"""Writes any source to WebDataset shards with a manifest, in parallel; resumes if interrupted."""

import io
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

from PIL import Image
from tqdm import tqdm

from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import IMAGE_HASH, ShardPrefetcher
from wuerstchen_pl.data.ordering.selection import SampleSelector
from wuerstchen_pl.data.sources import manifest
from wuerstchen_pl.data.sources.source import Sample, Source, name_digest
from wuerstchen_pl.data.sources.tar import tar_writer
from wuerstchen_pl.data.sources.tar_index import index_path, index_tar
from wuerstchen_pl.io.atomic import atomic_write
from wuerstchen_pl.io.image_files import CONTROL_SUFFIX, IMAGE_FORMATS, MASK_SUFFIX
from wuerstchen_pl.io.images import decode_image

_LOG = ".written.jsonl"
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, slots=True)
class Part:
    """The planned contents of one shard."""

    number: int
    samples: list[Sample]
    path: Path

    @property
    def content(self) -> str:
        """A hash of the samples' metadata."""
        fields = (
            (s.key, s.captions, s.width, s.height, s.size, s.metadata, s.mask_size, s.control_size)
            for s in self.samples
        )
        return name_digest("\n".join(map(repr, fields))).hex()


class Written(TypedDict):
    """A line of the log: number and content hash of a part, its entry, and unreadable samples."""

    number: int
    content: str
    entry: manifest.Entry
    unreadable: int


def build(
    source: Source,
    folder: Path,
    *,
    filters: Filters,
    settings: dict[str, Any],
    shard_samples: int,
    num_workers: int,
) -> tuple[list[manifest.Entry], Counter[str]]:
    """Write a source's training samples to ``folder``, in order, and ``shards.json``.

    Images of formats that shards allow keep their bytes. Shards are written atomically, and
    existing ones are reused.

    Args:
        source: a prepared source.
        folder: an existing folder, empty or begun by an earlier build with the same settings.
        filters: filters to apply.
        settings: what the result depends on.
        shard_samples: samples per shard.
        num_workers: number of worker processes; 0 uses this process.

    Returns:
        The manifest entries, and the number of samples left out, by reason.

    Raises:
        ValueError: nothing is left to write.
    """
    left_out: Counter[str] = Counter()
    parts = _parts(source, folder, filters, shard_samples, left_out)
    entries: dict[int, manifest.Entry] = {}
    with tqdm(desc=f"writing {folder}", unit=" images") as bar:
        for written in _written(source, parts, folder / _LOG, num_workers):
            entries[written["number"]] = written["entry"]
            left_out["unreadable image"] += written["unreadable"]
            bar.update(written["entry"]["samples"])
    if not sum(entry["samples"] for entry in entries.values()):
        raise ValueError(
            f"nothing is left to write to {folder} ({dict(+left_out) or 'no samples'}); check the "
            "source and its filters"
        )
    ordered = [entries[number] for number in sorted(entries)]
    for path in folder.glob("*.tar"):  # left over if the source has shrunk
        if path.name not in {entry["name"] for entry in ordered}:
            path.unlink()
            index_path(path).unlink(missing_ok=True)
    manifest.write(folder, ordered, settings=settings)
    return ordered, +left_out


def _parts(
    source: Source, folder: Path, filters: Filters, shard_samples: int, left_out: Counter[str]
) -> Iterator[Part]:
    """The filtered samples of a source, divided into parts of ``shard_samples``."""
    opener = ShardPrefetcher(source, keep=0, hashes=filters.deduplicate)
    shards = [shard for group in source.groups("train") for shard in group.shards]
    selector = SampleSelector(filters, shards=shards)
    waiting: list[Sample] = []
    number = 0
    for shard in shards:
        opened = opener.open(shard)
        for bad in opened.bad:
            left_out[bad.reason] += bad.count
        for sample in opened.samples:
            result = selector.select(sample)
            if isinstance(result, str):
                left_out[result] += 1
                continue
            waiting.append(result)
            if len(waiting) == shard_samples:
                yield Part(number, waiting, _path(folder, number))
                number, waiting = number + 1, []
    if waiting:
        yield Part(number, waiting, _path(folder, number))


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


def _written(
    source: Source, parts: Iterator[Part], log: Path, num_workers: int
) -> Iterator[Written]:
    """Write the parts, several in parallel, except those already written."""
    earlier = _read_log(log)
    # Spawn, as forking is unsafe while threads open shards.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context) if num_workers else nullcontext()
    with log.open("a", encoding="utf-8") as log_file, pool:

        def log_written(written: Written) -> Written:
            print(json.dumps(written), file=log_file, flush=True)
            return written

        running: set[Future[Written]] = set()
        for part in parts:
            if (previous := earlier.get(part.number)) and _is_current(previous, part):
                yield previous
            elif not isinstance(pool, ProcessPoolExecutor):
                yield log_written(_write(source, part))
            else:
                running.add(pool.submit(_write, source, part))
            if len(running) > 2 * num_workers:
                done, running = wait(running, return_when="FIRST_COMPLETED")
                yield from (log_written(future.result()) for future in done)
        yield from (log_written(future.result()) for future in running)


def _read_log(path: Path) -> dict[int, Written]:
    """The log by part number; truncated or invalid lines are skipped."""
    entries: dict[int, Written] = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            written = json.loads(line)
        except ValueError:
            continue
        if isinstance(written, dict) and written.keys() == Written.__annotations__.keys():
            entries[written["number"]] = cast("Written", written)
    return entries


def _is_current(written: Written, part: Part) -> bool:
    """Whether an earlier run wrote a part with the same content, and its file is complete."""
    if written["content"] != part.content or not part.path.is_file():
        return False
    return part.path.stat().st_size == written["entry"]["bytes"]


def _write(source: Source, part: Part) -> Written:
    """Write one shard, and its index."""
    kept = 0
    with atomic_write(part.path) as partial, tar_writer(partial) as tar:
        for index, sample in enumerate(part.samples):
            try:
                members = _members(source.read(sample), sample)
                for suffix, file in (MASK_SUFFIX, sample.mask), (CONTROL_SUFFIX, sample.control):
                    if file.size:
                        members[suffix.removeprefix(".")] = source.read(file)
            except OSError:
                continue
            tar.write({"__key__": f"{part.number:05d}{index:05d}", **members})
            kept += 1
    index_tar(str(part.path), part.path.name)  # writes its index
    return {
        "number": part.number,
        "content": part.content,
        "entry": manifest.entry_of(part.path, kept),
        "unreadable": len(part.samples) - kept,
    }


def _members(data: bytes, sample: Sample) -> dict[str, bytes]:
    """The tar members of one sample, by suffix."""
    suffix = _shard_suffix(data)
    if suffix is None:  # not a format of shards
        buffer = io.BytesIO()
        Image.fromarray(decode_image(data)).save(buffer, "PNG")
        data, suffix = buffer.getvalue(), "png"
    metadata: dict[str, Any] = {"width": sample.width, "height": sample.height, "name": sample.key}
    metadata |= {name: value for name, value in sample.metadata.items() if name != IMAGE_HASH}
    if len(sample.captions) > 1:
        metadata["captions"] = list(sample.captions)
    caption = sample.captions[0].encode()
    return {suffix: data, "txt": caption, "json": json.dumps(metadata).encode()}


def _shard_suffix(data: bytes) -> str | None:
    """The suffix of an image whose format shards allow, else None.

    Raises:
        OSError: it is not an image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as img:
            return _SUFFIXES.get(img.format or "")
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from error
