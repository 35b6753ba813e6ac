"""Plots histograms of the aspect ratios and sizes of a set of images."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wuerstchen_pl.data.ordering.buckets import Size

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 520, 240, 52, 34  # of a chart, in pixels
_BAR, _MARK, _INK = (70, 110, 180), (200, 80, 60), (40, 40, 40)


def plot_histograms(sizes: Sequence[tuple[int, int]], buckets: Sequence[Size]) -> Image.Image:
    """Plot two histograms: aspect ratios, with the buckets marked, and shorter sides.

    Args:
        sizes: (width, height) of each image.
        buckets: (height, width) of each bucket.
    """
    ratios = np.log2([width / height for width, height in sizes])
    sides = np.log2([min(size) for size in sizes])
    canvas = Image.new("RGB", (2 * _WIDTH, _HEIGHT), "white")
    marks = [math.log2(width / height) for height, width in buckets]
    span = max(1.5, *(abs(mark) + 0.25 for mark in marks))
    labels = [(math.log2(w / h), f"{w}:{h}") for w, h in ((1, 2), (2, 3), (1, 1), (3, 2), (2, 1))]
    left = _chart("width : height (red: buckets)", ratios, (-span, span), labels, marks)
    low, high = math.floor(sides.min()), math.ceil(sides.max() + 1e-9)
    powers = [(float(p), str(2**p)) for p in range(low, max(high, low + 1) + 1)]
    right = _chart("shorter side, px", sides, (low, max(high, low + 1)), powers, [])
    canvas.paste(left, (0, 0))
    canvas.paste(right, (_WIDTH, 0))
    return canvas


def _chart(
    title: str,
    values: np.ndarray,
    span: tuple[float, float],
    labels: Sequence[tuple[float, str]],
    marks: Sequence[float],
) -> Image.Image:
    """Plot one histogram; values outside the span are clipped to it."""
    img = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen, font = ImageDraw.Draw(img), ImageFont.load_default(size=12)
    counts, _ = np.histogram(values.clip(*span), bins=48, range=span)
    floor, ceiling = _HEIGHT - _BOTTOM, 26
    plot_width, max_count = _WIDTH - _LEFT - 16, max(1, int(counts.max()))

    def x_of(value: float) -> float:
        return _LEFT + (value - span[0]) / (span[1] - span[0]) * plot_width

    for i, count in enumerate(counts):
        top = floor - (floor - ceiling) * count / max_count
        start = _LEFT + plot_width * i / len(counts)
        pen.rectangle([start, top, start + plot_width / len(counts) - 1, floor], fill=_BAR)
    for mark in marks:
        pen.line([x_of(mark), ceiling, x_of(mark), floor], fill=_MARK)
    pen.line([_LEFT, floor, _LEFT + plot_width, floor], fill=_INK)
    for value, label in labels:
        if span[0] <= value <= span[1]:
            pen.line([x_of(value), floor, x_of(value), floor + 4], fill=_INK)
            pen.text((x_of(value), floor + 6), label, fill=_INK, font=font, anchor="mt")
    pen.text((_LEFT, 6), title, fill=_INK, font=font)
    pen.text((_LEFT - 6, ceiling), str(max_count), fill=_INK, font=font, anchor="rm")
    pen.text((_LEFT - 6, floor), "0", fill=_INK, font=font, anchor="rm")
    return img
