"""Draw a metric against guidance and steps: ``python scripts/plot_sweep.py outputs/evaluate``.

Reads the reports of a sweep by ``python -m wuerstchen_pl.evaluate -m``, a folder each; needs
``pip install -e '.[plot]'``.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Point(NamedTuple):
    """A run of a sweep."""

    line: str
    x: float
    value: float
    low: float
    high: float


def points(folder: Path, metric: str, x: str, by: str) -> list[Point]:
    """What the reports below a folder say of a metric.

    Args:
        folder: with ``metrics.json`` in folders below it.
        metric: a name of theirs.
        x: the setting along the axis.
        by: the setting, or ``model``, that tells lines apart.

    Raises:
        SystemExit: if there is nothing to draw.
    """
    found = [_point(report, metric, x, by) for report in _reports(folder)]
    if not found:
        sys.exit(f"{folder} holds no report; evaluate first, with -m")
    return sorted(found)


def _reports(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.rglob("metrics.json")):
        yield path, json.loads(path.read_text(encoding="utf-8"))


def _point(report: tuple[Path, dict[str, Any]], metric: str, x: str, by: str) -> Point:
    path, told = report
    if metric not in told["metrics"]:
        sys.exit(f"{path} has no metric {metric}; choose from {', '.join(told['metrics'])}")
    settings = {**told, **told["settings"]}
    if lacking := [key for key in (x, by) if key not in settings]:
        sys.exit(f"{path} has no setting {lacking[0]}; choose from {', '.join(told['settings'])}")
    score = told["metrics"][metric]
    low, high = (
        score[end] if score[end] is not None else score["value"] for end in ("low", "high")
    )
    return Point(f"{by} {settings[by]}", float(settings[x]), score["value"], low, high)


def draw(found: list[Point], metric: str, x: str, to: Path) -> None:
    """A line for each kind of run, with its intervals, as an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = defaultdict(list)
    for point in found:
        lines[point.line].append(point)
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, own in lines.items():
        xs, values = [p.x for p in own], [p.value for p in own]
        errors = [[p.value - p.low for p in own], [p.high - p.value for p in own]]
        axes.errorbar(xs, values, yerr=errors, marker="o", capsize=3, label=name)
    axes.set_xlabel(x.replace("_", " "))
    axes.set_ylabel(f"{metric} (95 % interval)")
    axes.legend()
    figure.savefig(to, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """The command-line program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("--metric", default="fid", help="a name in metrics.json")
    parser.add_argument("--x", default="prior_guidance_scale", help="the setting along the axis")
    parser.add_argument("--by", default="prior_steps", help="the setting of a line; or model")
    options = parser.parse_args()
    found = points(options.folder, options.metric, options.x, options.by)
    to = options.folder / f"{options.metric.replace('/', '_')}.png"
    draw(found, options.metric, options.x, to)
    print(to)


if __name__ == "__main__":
    main()
