"""Plots histograms of the aspect ratios and sizes of a set of images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from wuerstchen_pl.data.ordering.buckets import Size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NUM_BINS = 48
_RATIOS = {"1:2": 1 / 2, "2:3": 2 / 3, "1:1": 1.0, "3:2": 3 / 2, "2:1": 2.0}


def plot_histograms(sizes: Sequence[tuple[int, int]], buckets: Sequence[Size]) -> "Figure":
    """Histograms on logarithmic axes: aspect ratios, with the buckets, and shorter sides.

    Args:
        sizes: (width, height) of each image.
        buckets: (height, width) of each bucket.
    """
    from matplotlib.figure import Figure  # takes a third of a second

    figure = Figure(figsize=(10.4, 2.6), layout="constrained")
    ratio_axes, side_axes = figure.subplots(1, 2)
    marks = [width / height for height, width in buckets]
    span = 2 ** max(1.5, *(abs(np.log2(mark)) + 0.25 for mark in marks))
    ratios = np.clip([width / height for width, height in sizes], 1 / span, span)
    ratio_axes.hist(ratios, bins=np.geomspace(1 / span, span, _NUM_BINS + 1))
    for mark in marks:
        ratio_axes.axvline(mark, color="tab:red", linewidth=1)
    ratio_axes.set_xscale("log", base=2)
    ratio_axes.set_xticks(list(_RATIOS.values()), list(_RATIOS))
    ratio_axes.set_title("width : height (red: buckets)")
    sides = [min(size) for size in sizes]
    low, high = 2.0 ** np.floor(np.log2(min(sides))), 2.0 ** np.ceil(np.log2(max(sides) + 1))
    side_axes.hist(sides, bins=np.geomspace(low, high, _NUM_BINS + 1))
    side_axes.set_xscale("log", base=2)
    side_axes.xaxis.set_major_formatter("{x:g}")
    side_axes.set_title("shorter side, px")
    return figure
