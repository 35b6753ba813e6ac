"""The report: ``metrics.json``, ``scores.csv``, ``index.html`` and a table for the terminal."""

import csv
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.metrics.feature_networks import RESIZE_METHOD
from wuerstchen_pl.evaluation.metrics.score import Score
from wuerstchen_pl.io.atomic import write_text
from wuerstchen_pl.io.versions import installed_versions

PACKAGES = ("wuerstchen_pl", "torch", "torchvision", "torchmetrics", "torch-fidelity",
            "open_clip_torch", "pillow")  # fmt: skip
TITLE_KEYS = ("model", "run", "step", "images")
"""Metadata keys that form the title of the page."""
NUM_EXAMPLES = 8
"""Number of best and of worst images shown per metric."""
INTERVALS = "95 %: Wilson of proportions, bootstrap of means, 1.96 bootstrap deviations of sets"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
figure { display: inline-block; margin: 4px; width: 128px; vertical-align: top; font-size: 12px }
figure img { display: block; margin: 0 auto; max-width: 128px; max-height: 128px }
figcaption { text-align: center; line-height: 1.2; color: #444; overflow-wrap: anywhere }
td, th { padding: 2px 14px 2px 0; text-align: left } .number { text-align: right }
"""


def write_report(
    folder: Path,
    metadata: dict[str, Any],
    network_scores: Mapping[str, Score],
    image_scores: Mapping[str, Score],
    images: ImageFolder | None,
) -> Path:
    """Write the report into a folder, and return the path of ``metrics.json``.

    Args:
        folder: output folder.
        metadata: what was evaluated, such as the model and its step.
        network_scores: scores of the model on its own data.
        image_scores: scores of the images.
        images: the images; None if no metric needs images.

    Raises:
        OSError: if a file cannot be written; the message names it.
    """
    packages = installed_versions(PACKAGES)
    method = {"resized_by": RESIZE_METHOD, "interval": INTERVALS, "versions": packages}
    scores = {**network_scores, **image_scores}
    numbers = {name: score_to_json(score) for name, score in scores.items()}
    per_image = {name: score.per_sample for name, score in image_scores.items() if score.per_sample}
    if images is not None:
        method["format"] = ", ".join(sorted({p.suffix[1:].upper() for p in images.paths}))
        write_text(folder / "scores.csv", image_table(images, per_image))
    else:
        (folder / "scores.csv").unlink(missing_ok=True)  # of an earlier run
    write_text(folder / "index.html", html_page(scores, metadata, images, per_image, folder))
    content = {**metadata, **method, "metrics": numbers}
    path = folder / "metrics.json"
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return path


def score_to_json(score: Score) -> dict[str, Any]:
    """A score as JSON, without its per-sample values; non-finite values become null."""
    entry: dict[str, Any] = {
        "value": score.value,
        "low": score.low,
        "high": score.high,
        "number": score.number,
    }
    finite = {k: v if v is None or math.isfinite(v) else None for k, v in entry.items()}
    return finite | score.metadata


def table(scores: Mapping[str, Score]) -> str:
    """Scores as a plain-text table, one line each."""
    width = max(map(len, scores))
    return "\n".join(
        f"{name:{width}s} {score.value:10.4g}  {_interval(score):24s} {score.number} images"
        for name, score in scores.items()
    )


def _interval(score: Score) -> str:
    return "" if score.low is None else f"{score.low:.4g} to {score.high:.4g}"


def image_table(images: ImageFolder, per_image: Mapping[str, Sequence[float]]) -> str:
    """Per-image scores as CSV."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "prompt", *per_image])
    for index, path in enumerate(images.paths):
        prompt = images.prompts[index] if images.prompts else ""
        rows.writerow([path.name, prompt, *(values[index] for values in per_image.values())])
    return text.getvalue()


def html_page(
    scores: Mapping[str, Score],
    metadata: dict[str, Any],
    images: ImageFolder | None,
    per_image: Mapping[str, Sequence[float]],
    folder: Path,
) -> str:
    """The scores, and the best and worst images by each per-image score."""
    title = html.escape(
        " ".join(f"{k} {metadata[k]}" for k in TITLE_KEYS if metadata.get(k) is not None)
    )
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td class=number>{score.value:.4g}</td>"
        f"<td>{_interval(score)}</td><td class=number>{score.number}</td></tr>"
        for name, score in scores.items()
    )
    head = "<tr><th></th><th></th><th>95 %</th><th>images</th></tr>"
    parts = [f"<h1>{title}</h1><table>{head}{rows}</table>"]
    for name, values in per_image.items() if images is not None else ():
        assert images is not None
        order = sorted(range(len(values)), key=lambda index: -values[index])
        for rank, chosen in (("best", order[:NUM_EXAMPLES]), ("worst", order[::-1][:NUM_EXAMPLES])):
            figures = "".join(_figure(images, i, values[i], folder) for i in chosen)
            parts.append(f"<h2>{rank} by {html.escape(name)}</h2><div>{figures}</div>")
    style = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html>{style}{''.join(parts)}\n"


def _figure(images: ImageFolder, index: int, value: float, folder: Path) -> str:
    source = html.escape(os.path.relpath(images.paths[index], folder))
    prompt = html.escape(images.prompts[index] if images.prompts else "")
    caption = f"{prompt}<br>{value:.4g}"
    return f'<figure><img alt="{prompt}" src="{source}"><figcaption>{caption}</figcaption></figure>'
