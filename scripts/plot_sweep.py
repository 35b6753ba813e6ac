"""Plot a metric over guidance scale and steps: ``python scripts/plot_sweep.py outputs/evaluate``.

Reads the reports of a ``python -m wuerstchen_pl.evaluate -m`` sweep, one folder per run.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure


class Point(NamedTuple):
    """One run of a sweep: its line in the plot, x, the metric and its 95 % interval."""

    line: str
    x: float
    value: float
    low: float
    high: float


def points(folder: Path, metric: str, x: str, by: str) -> list[Point]:
    """The value of a metric in every report below a folder, sorted by line and x.

    Args:
        folder: searched recursively for ``metrics.json``.
        metric: name of a metric in the reports.
        x: the setting on the x axis.
        by: the setting, or ``model``, that defines the lines.

    Raises:
        SystemExit: if there is no report, or a report lacks the metric or a setting.
    """
    results = [_point(path, report, metric, x, by) for path, report in _reports(folder)]
    if not results:
        sys.exit(f"{folder} holds no report; evaluate first, with -m")
    return sorted(results)


def _reports(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.rglob("metrics.json")):
        yield path, json.loads(path.read_text(encoding="utf-8"))


def _point(path: Path, report: dict[str, Any], metric: str, x: str, by: str) -> Point:
    if metric not in report["metrics"]:
        sys.exit(f"{path} has no metric {metric}; choose from {', '.join(report['metrics'])}")
    settings = {**report, **report["settings"]}
    if missing := [key for key in (x, by) if key not in settings]:
        sys.exit(f"{path} has no setting {missing[0]}; choose from {', '.join(report['settings'])}")
    score = report["metrics"][metric]
    low, high = (
        score[end] if score[end] is not None else score["value"] for end in ("low", "high")
    )
    return Point(f"{by} {settings[by]}", float(settings[x]), score["value"], low, high)


def plot(results: list[Point], metric: str, x: str, to: Path) -> None:
    """Plot one line per ``Point.line``, with intervals, to an image file."""
    lines = defaultdict(list)
    for point in results:
        lines[point.line].append(point)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        xs, values = [p.x for p in line], [p.value for p in line]
        errors = [[p.value - p.low for p in line], [p.high - p.value for p in line]]
        axes.errorbar(xs, values, yerr=errors, marker="o", capsize=3, label=name)
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(f"{metric} (95 % interval)")
    axes.legend()
    figure.savefig(to, dpi=120)


def main() -> None:
    """The command-line program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="output folder of the sweep")
    parser.add_argument("--metric", default="fid", help="a name in metrics.json")
    parser.add_argument("--x", default="prior_guidance_scale", help="the setting on the x axis")
    parser.add_argument(
        "--by", default="prior_steps", help="the setting that defines the lines, or model"
    )
    options = parser.parse_args()
    results = points(options.folder, options.metric, options.x, options.by)
    to = options.folder / f"{options.metric.replace('/', '_')}.png"
    plot(results, options.metric, options.x, to)
    print(to)


if __name__ == "__main__":
    main()
