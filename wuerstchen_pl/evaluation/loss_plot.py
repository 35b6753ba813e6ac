"""A plot of validation losses over the diffusion time t."""

import io
import re
from collections.abc import Mapping

from wuerstchen_pl.evaluation.metrics.score import Score

LOSS_AT_TIME = re.compile(r"(?P<stage>stage_\w+)/loss_t(?P<t>[\d.]+)")
"""Names of the losses in one bin of t."""


def losses_over_time(scores: Mapping[str, Score]) -> dict[str, dict[float, Score]]:
    """The losses in bins of t: stage -> center of the bin -> loss."""
    losses: dict[str, dict[float, Score]] = {}
    for name, score in scores.items():
        if match := LOSS_AT_TIME.fullmatch(name):
            losses.setdefault(match["stage"], {})[float(match["t"])] = score
    return losses


def plot_losses(losses: Mapping[str, Mapping[float, Score]]) -> str:
    """SVG with a plot per stage of its losses and their 95 % intervals."""
    from matplotlib.figure import Figure  # takes a third of a second

    figure = Figure(figsize=(3.8 * len(losses), 2.6), layout="constrained")
    for axes, (stage, by_time) in zip(
        figure.subplots(1, len(losses), squeeze=False)[0], losses.items(), strict=True
    ):
        times, values = list(by_time), [score.value for score in by_time.values()]
        lows = [s.value if s.low is None else s.low for s in by_time.values()]
        highs = [s.value if s.high is None else s.high for s in by_time.values()]
        axes.plot(times, values, marker="o", markersize=3)
        axes.fill_between(times, lows, highs, alpha=0.2)
        axes.set(title=stage.replace("_", " "), xlabel="t", ylabel="loss", xlim=(0, 1))
        axes.set_ylim(bottom=0)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]
