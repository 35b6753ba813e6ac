"""Inspects a dataset before training: sizes, damage, filters and buckets."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.control import decode_control
from wuerstchen_pl.data.loading.masks import decode_mask, has_mask
from wuerstchen_pl.data.loading.resources import cpu_count
from wuerstchen_pl.data.ordering.buckets import Size, enlargement
from wuerstchen_pl.data.ordering.prefetch import ShardPrefetcher
from wuerstchen_pl.data.ordering.selection import SampleSelector
from wuerstchen_pl.data.sources.source import IGNORED, Sample, SampleError, Split
from wuerstchen_pl.io.images import decode_image
from wuerstchen_pl.plural import plural

_EXAMPLES = 3
_AHEAD = 4  # shards opened in the background


@dataclass(slots=True)
class Inspection:
    """The result of ``inspect_data``.

    Attributes:
        shards: number of opened shards.
        broken: number of missing, damaged or truncated shards.
        sizes: (width, height) of every complete sample.
        bad: number of samples and files that are not used, by reason.
        examples: locations of the first of these, by reason.
        dropped: number of dropped samples, by filter.
        buckets: number of usable images, by (height, width).
        masks: number of usable images with a mask, if masks are used; otherwise with a mask file.
        uses_masks: whether masks are used.
        controls: number of usable images with a control image.
        weighted: number of usable images with a weight other than 1.
        cropped: share of the pixels of usable images that is cropped away.
    """

    shards: int = 0
    broken: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    buckets: Counter[Size] = field(default_factory=Counter)
    masks: int = 0
    uses_masks: bool = False
    controls: int = 0
    weighted: int = 0
    cropped: float = 0.0

    @property
    def left(self) -> int:
        """The number of usable images."""
        return sum(self.buckets.values())

    def note(self, bad: SampleError) -> None:
        """Count a bad sample, and keep the first examples."""
        self.bad[bad.reason] += bad.count
        self.examples.setdefault(bad.reason, [])
        if len(self.examples[bad.reason]) < _EXAMPLES:
            self.examples[bad.reason].append(bad.where)


def inspect_data(module: ImageTextDataModule, split: Split = "train", *, full: bool) -> Inspection:
    """Inspect every shard of a split.

    Args:
        module: data module with the source, filters and buckets.
        split: "train", including samples held out for validation; or "val", if it has its own
            shards.
        full: also decode every image, instead of trusting the metadata.
    """
    inspection, source = Inspection(uses_masks=module.mask is not None), module.source
    opener = ShardPrefetcher(source, keep=0, hashes=module.filters.deduplicate)
    names = [shard for group in source.groups(split) for shard in group.shards]
    selector = SampleSelector(
        module.filters, shards=names, buckets=module.buckets, max_upscale=module.max_upscale
    )
    kept_pixels = pixels = 0.0
    with ThreadPoolExecutor(cpu_count()) as threads, closing(opener):
        for number, shard in enumerate(tqdm(names, desc="inspecting shards", unit=" shards")):
            opener.expect(names[number : number + _AHEAD])
            opened = opener.open(shard)
            inspection.shards += 1
            inspection.broken += opened.broken
            for bad in opened.bad:
                inspection.note(bad)
            inspection.sizes += [(s.width, s.height) for s in opened.samples]
            readable = opened.samples
            if full:
                errors = list(threads.map(lambda s: _decoding_error(module, s), readable))
                for bad in filter(None, errors):
                    inspection.note(bad)
                readable = [s for s, bad in zip(readable, errors, strict=True) if bad is None]
            for sample in readable:
                result = selector.select(sample)
                if isinstance(result, str):
                    inspection.dropped[result] += 1
                else:
                    size = module.buckets.assign(result, inspection.left)
                    inspection.buckets[size] += 1
                    inspection.weighted += sample.weight != 1
                    inspection.controls += sample.control_size > 0
                    with suppress(OSError):  # a bad sample of a full inspection
                        inspection.masks += has_mask(source, sample, module.mask)
                    kept_pixels += size[0] * size[1] / enlargement(sample, size) ** 2
                    pixels += sample.width * sample.height
    inspection.cropped = 1 - kept_pixels / pixels if pixels else 0.0
    return inspection


def _decoding_error(module: ImageTextDataModule, sample: Sample) -> SampleError | None:
    try:
        data = module.source.read(sample)
        decode_image(data)
        decode_mask(module.source, sample, data, module.mask)
        if module.control:
            decode_control(module.source, sample)
    except OSError as error:
        return SampleError("unreadable image", f"{sample.name}: {error}")
    return None


def format_report(inspection: Inspection, pixels_per_position: float | None = None) -> str:
    """An inspection as lines for the terminal.

    Args:
        inspection: of a split.
        pixels_per_position: side of the square of pixels that a semantic position encodes; None
            lists no positions.
    """
    lines = [
        f"{plural(inspection.shards, 'shard')}, {inspection.broken} of them damaged or missing"
    ]
    lines.append(f"{plural(len(inspection.sizes), 'complete sample')}")
    for reason, number in inspection.bad.most_common():
        examples = "; ".join(inspection.examples[reason])
        kind = "ignored" if reason in IGNORED else "bad"
        lines.append(f"  {number:8d} {kind}: {reason}, such as {examples}")
    if inspection.sizes:
        sides = np.sort(np.array(inspection.sizes), axis=1)
        ratios = np.array([width / height for width, height in inspection.sizes])
        lines.append("shorter side, px: " + _quantiles(sides[:, 0], ".0f"))
        lines.append("width / height:   " + _quantiles(ratios, ".2f"))
    for name, number in inspection.dropped.most_common():
        lines.append(f"  {number:8d} dropped: {name}")
    lines.append(
        f"{plural(inspection.left, 'image')} left, {inspection.cropped:.1%} of their pixels "
        "cropped away"
    )
    if inspection.masks or inspection.uses_masks:
        unused = "" if inspection.uses_masks else ", which data.mask=file uses"
        lines.append(f"{plural(inspection.masks, 'image')} with a mask{unused}")
    if inspection.controls:
        lines.append(f"{plural(inspection.controls, 'image')} with a control image")
    if inspection.weighted:
        lines.append(f"{plural(inspection.weighted, 'image')} with a weight other than 1")
    for (height, width), number in sorted(inspection.buckets.items()):
        positions = ""
        if pixels_per_position is not None:
            rows, columns = (math.ceil(side / pixels_per_position) for side in (height, width))
            positions = f", {rows} x {columns} semantic positions"
        lines.append(f"  {number:8d} in {height} x {width} px{positions}")
    # File names may contain invalid Unicode, which terminals reject.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _quantiles(values: np.ndarray, form: str) -> str:
    shares = (0.0, 0.05, 0.5, 0.95, 1.0)
    return ", ".join(
        f"{label} {value:{form}}"
        for label, value in zip(
            ("min", "5 %", "median", "95 %", "max"), np.quantile(values, shares), strict=True
        )
    )
