"""What a set of images holds, looked at before anybody trains on it."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from wuerstchen_pl.data.datamodule import ImageTextDataModule, cpu_count
from wuerstchen_pl.data.ordering.buckets import Size, enlargement
from wuerstchen_pl.data.ordering.prefetch import IMAGE_HASH, ShardPrefetcher
from wuerstchen_pl.data.sources.source import Sample, SampleError, Source, Split
from wuerstchen_pl.io.images import decode_image

_EXAMPLES = 3
_AHEAD = 4  # shards that are opened before they are needed


@dataclass(slots=True)
class Inspection:
    """Counts of everything; see `survey`.

    Attributes:
        shards: how many were opened.
        broken: how many of them are absent, damaged or cut short.
        sizes: (width, height) of every complete sample.
        bad: what cannot be used, by reason.
        examples: where the first of these are.
        dropped: what filters drop, by filter.
        buckets: images of each (height, width) that are left to train on.
        cropped: share of the pixels of these that crops cut away.
    """

    shards: int = 0
    broken: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    buckets: Counter[Size] = field(default_factory=Counter)
    cropped: float = 0.0

    @property
    def left(self) -> int:
        """How many images can be used."""
        return sum(self.buckets.values())

    def note(self, bad: SampleError) -> None:
        """Count something bad."""
        self.bad[bad.reason] += bad.count
        self.examples.setdefault(bad.reason, [])
        if len(self.examples[bad.reason]) < _EXAMPLES:
            self.examples[bad.reason].append(bad.where)


def inspect_data(module: ImageTextDataModule, split: Split = "train", *, full: bool) -> Inspection:
    """Look at every shard of a split.

    Args:
        module: the data, with its filters and buckets.
        split: "train", which holds what a share keeps for validation, too; or "val", if that has
            shards of its own.
        full: decode every image too; else their metadata are believed.
    """
    found, source = Inspection(), module.source
    opener = ShardPrefetcher(source, keep=0, hashes=module.filters.deduplicate)
    names = [shard for group in source.groups(split) for shard in group.shards]
    seen: set[int] = set()
    kept = area = 0.0
    with ThreadPoolExecutor(cpu_count()) as threads, closing(opener):
        for number, shard in enumerate(tqdm(names, desc="looking at shards", unit=" shards")):
            opener.expect(names[number : number + _AHEAD])
            opened = opener.open(shard)
            found.shards, found.broken = found.shards + 1, found.broken + opened.broken
            for bad in opened.bad:
                found.note(bad)
            found.sizes += [(s.width, s.height) for s in opened.samples]
            readable = opened.samples
            if full:
                results = list(threads.map(lambda s: _damage(source, s), readable))
                for bad in filter(None, results):
                    found.note(bad)
                readable = [s for s, bad in zip(readable, results, strict=True) if bad is None]
            for sample in readable:
                size = _size_of(module, sample, seen, found)
                if size is not None:
                    found.buckets[size] += 1
                    kept += size[0] * size[1] / enlargement(sample, size) ** 2
                    area += sample.width * sample.height
    found.cropped = 1 - kept / area if area else 0.0
    return found


def _damage(source: Source, sample: Sample) -> SampleError | None:
    try:
        decode_image(source.read(sample))
    except OSError as error:
        return SampleError("unreadable image", f"{sample.name}: {error}")
    return None


def _size_of(
    module: ImageTextDataModule, sample: Sample, seen: set[int], found: Inspection
) -> Size | None:
    """Return the bucket of a sample, or count what drops it."""
    passed = module.filters.apply(sample)
    image = sample.metadata.get(IMAGE_HASH)
    if isinstance(passed, Sample) and image is not None and image in seen:
        passed = "duplicate"
    if isinstance(passed, str):
        found.dropped[passed] += 1
        return None
    seen.update([] if image is None else [int(image)])
    if module.max_upscale and module.buckets.enlargement(passed) > module.max_upscale:
        found.dropped["max_upscale"] += 1
        return None
    return module.buckets.place(passed, sum(found.buckets.values()))


def format_report(found: Inspection) -> str:
    """Say it in lines for the terminal."""
    lines = [f"{found.shards} shards, {found.broken} of them damaged or absent"]
    lines.append(f"{len(found.sizes)} complete samples")
    for reason, number in found.bad.most_common():
        lines.append(f"  {number:8d} bad: {reason}, such as {'; '.join(found.examples[reason])}")
    if found.sizes:
        sides = np.sort(np.array(found.sizes), axis=1)
        ratios = np.array([width / height for width, height in found.sizes])
        lines.append("shorter side, px: " + _quantiles(sides[:, 0], ".0f"))
        lines.append("width / height:   " + _quantiles(ratios, ".2f"))
    for name, number in found.dropped.most_common():
        lines.append(f"  {number:8d} dropped by {name}")
    lines.append(f"{found.left} images left, {found.cropped:.1%} of their pixels cropped away")
    for (height, width), number in sorted(found.buckets.items()):
        positions = f"{-(-3 * height // 128)} x {-(-3 * width // 128)}"
        lines.append(f"  {number:8d} in {height} x {width} px, {positions} semantic positions")
    # names of files need not be Unicode, and terminals insist on it
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _quantiles(values: np.ndarray, form: str) -> str:
    shares = (0.0, 0.05, 0.5, 0.95, 1.0)
    return ", ".join(
        f"{label} {value:{form}}"
        for label, value in zip(
            ("least", "5 %", "median", "95 %", "greatest"), np.quantile(values, shares), strict=True
        )
    )
