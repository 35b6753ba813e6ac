"""Writes any source as WebDataset shards with a manifest, in parallel; goes on where it was."""

import io
import json
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from wuerstchen_pl.data import manifest
from wuerstchen_pl.data.filters import Filters
from wuerstchen_pl.data.opener import PICTURE_HASH, Opener
from wuerstchen_pl.data.source import Bad, Sample, Source
from wuerstchen_pl.data.tar import index_tar
from wuerstchen_pl.data.transforms import FORMATS, decode

_SETTINGS = ".build.json"
_KINDS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True, slots=True)
class Part:
    """What one shard is to hold."""

    number: int
    samples: list[Sample]
    path: Path


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

    Pictures keep their bytes. A shard appears whole or not at all; those that are there already are
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
    _claim(folder, settings)
    left_out: Counter[str] = Counter()
    entries: dict[int, manifest.Entry] = {}
    with tqdm(desc=f"writing {folder}", unit="picture") as bar:
        for number, entry, bad in _written(
            source, _parts(source, folder, filters, shard_samples, left_out), num_workers
        ):
            entries[number] = entry
            left_out.update({reason: count for reason, count in bad.items()})
            bar.update(entry["samples"])
    if not sum(entry["samples"] for entry in entries.values()):
        raise ValueError(f"nothing is left to write to {folder} ({dict(left_out) or 'no samples'})")
    listed = [entries[number] for number in sorted(entries)]
    manifest.write(folder, listed, settings=settings)
    return listed, left_out


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder ours, or make sure that it is."""
    written = json.loads(json.dumps(settings))
    path = folder / _SETTINGS
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        other = sorted(k for k in {**before, **written} if before.get(k) != written.get(k))
        if other:
            raise ValueError(
                f"to={str(folder)!r} was begun with {other[0]}={before.get(other[0])!r}, and this "
                f"is {written.get(other[0])!r}: choose another folder, or delete that one."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"to={str(folder)!r} holds something else: choose a new folder.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(written), "utf-8")


def _parts(
    source: Source, folder: Path, filters: Filters, shard_samples: int, left_out: Counter[str]
) -> Iterator[Part]:
    """Cut what the filters leave of a source into shards to be."""
    opener = Opener(source, keep=0, hashes=filters.deduplicate)
    waiting: list[Sample] = []
    seen: set[float] = set()
    number = 0
    for shard in [shard for group in source.groups("train") for shard in group.shards]:
        opened = opener.open(shard)
        for bad in opened.bad:
            left_out[bad.reason] += bad.count
        for sample in opened.samples:
            picture = sample.facts.get(PICTURE_HASH)
            passed = "duplicate" if picture in seen else filters.apply(sample)
            seen.update([] if picture is None else [picture])
            if isinstance(passed, str):
                left_out[passed] += 1
                continue
            waiting.append(passed)
            if len(waiting) == shard_samples:
                yield Part(number, waiting, folder / f"{number:05d}.tar")
                number, waiting = number + 1, []
    if waiting:
        yield Part(number, waiting, folder / f"{number:05d}.tar")


Result = tuple[int, manifest.Entry, dict[str, int]]


def _written(source: Source, parts: Iterator[Part], num_workers: int) -> Iterator[Result]:
    """Write parts, a few at a time."""
    if num_workers == 0:
        yield from (_write(source, part) for part in parts)
        return
    # spawned, as threads may be opening shards
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        running: set[Future[Result]] = set()
        for part in parts:
            running.add(pool.submit(_write, source, part))
            if len(running) > 2 * num_workers:
                done, running = wait(running, return_when="FIRST_COMPLETED")
                yield from (future.result() for future in done)
        yield from (future.result() for future in running)


def _write(source: Source, part: Part) -> Result:
    """Write one shard, unless it is there."""
    if part.path.is_file():
        kept = len(index_tar(str(part.path), part.path.name).samples)
        lost = {"unreadable picture": len(part.samples) - kept} if kept < len(part.samples) else {}
        return part.number, manifest.entry_of(part.path, kept), lost
    partial = part.path.with_suffix(".partial")
    bad: list[Bad] = []
    kept = 0
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for place, sample in enumerate(part.samples):
            try:
                members = _members(source.read(sample), sample)
            except OSError as error:
                bad.append(Bad("unreadable picture", f"{sample.name}: {error}"))
                continue
            for suffix, data in members.items():
                # TarInfo's default time is 0, so that the same samples give the same bytes.
                entry = tarfile.TarInfo(f"{part.number:05d}{place:05d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            kept += 1
    os.replace(partial, part.path)
    counts = {"unreadable picture": len(bad)} if bad else {}
    return part.number, manifest.entry_of(part.path, kept), counts


def _members(data: bytes, sample: Sample) -> dict[str, bytes]:
    """The files of one sample."""
    kind = _kind(data)
    if kind is None:  # a kind that shards do not have
        buffer = io.BytesIO()
        Image.fromarray(decode(data)).save(buffer, "PNG")
        data, kind = buffer.getvalue(), "png"
    facts: dict[str, Any] = {"width": sample.width, "height": sample.height, "name": sample.key}
    facts |= {name: fact for name, fact in sample.facts.items() if name != PICTURE_HASH}
    if len(sample.captions) > 1:
        facts["captions"] = list(sample.captions)
    caption = sample.captions[0].encode()
    return {kind: data, "txt": caption, "json": json.dumps(facts).encode()}


def _kind(data: bytes) -> str | None:
    """The suffix of a picture that shards may hold as it is, or None.

    Raises:
        OSError: it is no picture.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as img:
            return _KINDS.get(img.format or "")
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from error
