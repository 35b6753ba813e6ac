"""Writes any source as WebDataset shards with a manifest, in parallel; resumes where it stopped."""

import io
import json
import multiprocessing
import tarfile
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
from wuerstchen_pl.data.output_guard import claim_output
from wuerstchen_pl.data.sources import manifest
from wuerstchen_pl.data.sources.source import Sample, Source, name_digest
from wuerstchen_pl.io.atomic import atomic_write
from wuerstchen_pl.io.images import IMAGE_FORMATS, decode_image

_LOG = ".written.jsonl"
_KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, slots=True)
class Part:
    """What one shard is to hold."""

    number: int
    samples: list[Sample]
    path: Path

    @property
    def content(self) -> str:
        """A hash of what is known of the samples."""
        known = ((s.key, s.captions, s.width, s.height, s.size, s.metadata) for s in self.samples)
        return name_digest("\n".join(map(repr, known))).hex()


class Written(TypedDict):
    """A line of the log: which part was written, of what, and how many samples it lacks."""

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
    """Write a source's training samples to `folder`, in their order, and `shards.json`.

    Images keep their bytes. A shard appears whole or not at all; those that are there already are
    not written again.

    Args:
        source: what to write; ready.
        folder: a new one, or one that an earlier build with the same settings began.
        filters: what to leave out.
        settings: what the result depends on.
        shard_samples: samples of a shard.
        num_workers: processes; 0 works in this one.

    Returns:
        The shards, and what was left out, by reason.

    Raises:
        ValueError: the folder holds something else, or nothing is left to write.
    """
    claim_output(folder, settings, key="to")
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
            f"nothing is left to write to {folder} ({dict(+left_out) or 'no samples'})"
        )
    listed = [entries[number] for number in sorted(entries)]
    for path in folder.glob("*.tar"):  # the source held more before
        if path.name not in {entry["name"] for entry in listed}:
            path.unlink()
    manifest.write(folder, listed, settings=settings)
    return listed, +left_out


def _parts(
    source: Source, folder: Path, filters: Filters, shard_samples: int, left_out: Counter[str]
) -> Iterator[Part]:
    """Cut what the filters leave of a source into shards to be."""
    opener = ShardPrefetcher(source, keep=0, hashes=filters.deduplicate)
    waiting: list[Sample] = []
    seen: set[float] = set()
    number = 0
    for shard in [shard for group in source.groups("train") for shard in group.shards]:
        opened = opener.open(shard)
        for bad in opened.bad:
            left_out[bad.reason] += bad.count
        for sample in opened.samples:
            passed = filters.apply(sample)
            image = sample.metadata.get(IMAGE_HASH)
            if isinstance(passed, Sample) and image in seen:
                passed = "duplicate"
            if isinstance(passed, str):
                left_out[passed] += 1
                continue
            seen.update([] if image is None else [image])
            waiting.append(passed)
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
    """Write parts, a few at a time, but for those that are there already."""
    before = _read_log(log)
    # spawned, as threads may be opening shards
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context) if num_workers else nullcontext()
    with log.open("a", encoding="utf-8") as lines, pool:

        def noted(written: Written) -> Written:
            print(json.dumps(written), file=lines, flush=True)
            return written

        running: set[Future[Written]] = set()
        for part in parts:
            if (known := before.get(part.number)) and _is_there(known, part):
                yield known
            elif not isinstance(pool, ProcessPoolExecutor):
                yield noted(_write(source, part))
            else:
                running.add(pool.submit(_write, source, part))
            if len(running) > 2 * num_workers:
                done, running = wait(running, return_when="FIRST_COMPLETED")
                yield from (noted(future.result()) for future in done)
        yield from (noted(future.result()) for future in running)


def _read_log(path: Path) -> dict[int, Written]:
    """Read the log; a line that was cut short, and what its part was, does not count."""
    found: dict[int, Written] = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            written = json.loads(line)
        except ValueError:
            continue
        if isinstance(written, dict) and written.keys() == Written.__annotations__.keys():
            found[written["number"]] = cast("Written", written)
    return found


def _is_there(written: Written, part: Part) -> bool:
    """Whether an earlier run wrote this very part, and nobody cut it short."""
    if written["content"] != part.content or not part.path.is_file():
        return False
    return part.path.stat().st_size == written["entry"]["bytes"]


def _write(source: Source, part: Part) -> Written:
    """Write one shard."""
    kept = 0
    with (
        atomic_write(part.path) as partial,
        tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for place, sample in enumerate(part.samples):
            try:
                members = _members(source.read(sample), sample)
            except OSError:
                continue
            for suffix, data in members.items():
                # TarInfo's default time is 0, so that the same samples give the same bytes.
                entry = tarfile.TarInfo(f"{part.number:05d}{place:05d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            kept += 1
    return {
        "number": part.number,
        "content": part.content,
        "entry": manifest.entry_of(part.path, kept),
        "unreadable": len(part.samples) - kept,
    }


def _members(data: bytes, sample: Sample) -> dict[str, bytes]:
    """The files of one sample."""
    kind = _kind(data)
    if kind is None:  # a kind that shards do not have
        buffer = io.BytesIO()
        Image.fromarray(decode_image(data)).save(buffer, "PNG")
        data, kind = buffer.getvalue(), "png"
    metadata: dict[str, Any] = {"width": sample.width, "height": sample.height, "name": sample.key}
    metadata |= {name: fact for name, fact in sample.metadata.items() if name != IMAGE_HASH}
    if len(sample.captions) > 1:
        metadata["captions"] = list(sample.captions)
    caption = sample.captions[0].encode()
    return {kind: data, "txt": caption, "json": json.dumps(metadata).encode()}


def _kind(data: bytes) -> str | None:
    """The suffix of an image that shards may hold as it is, or None.

    Raises:
        OSError: it is not an image.
    """
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as img:
            return _KINDS.get(img.format or "")
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from error
