"""The report: ``metrics.json``, ``scores.csv``, ``index.html`` and a table for the terminal."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.metrics.feature_networks import RESIZE_METHOD
from wuerstchen_pl.evaluation.metrics.score import Score, format_interval
from wuerstchen_pl.evaluation.page import html_page
from wuerstchen_pl.io.atomic import write_text
from wuerstchen_pl.io.versions import installed_versions
from wuerstchen_pl.plural import plural

PACKAGES = ("wuerstchen_pl", "torch", "torchvision", "torchmetrics", "torch-fidelity",
            "open_clip_torch", "pillow")  # fmt: skip
INTERVALS = "95 %: Wilson of proportions, bootstrap of means, 1.96 bootstrap deviations of sets"


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
        f"{name:{width}s} {score.value:10.4g}  {format_interval(score):24s} "
        f"{plural(score.number, 'image')}"
        for name, score in scores.items()
    )


def image_table(images: ImageFolder, per_image: Mapping[str, Sequence[float]]) -> str:
    """Per-image scores as CSV."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "prompt", *per_image])
    for index, path in enumerate(images.paths):
        prompt = images.prompts[index] if images.prompts else ""
        rows.writerow([path.name, prompt, *(values[index] for values in per_image.values())])
    return text.getvalue()
