"""The report: ``metrics.json``, CSV files, ``index.html`` and a table for the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.metrics.feature_networks import RESIZE_METHOD
from wuerstchen_pl.evaluation.metrics.score import Score, format_interval
from wuerstchen_pl.evaluation.page import html_page
from wuerstchen_pl.evaluation.scored_images import CSV_FILES, ScoredImages, in_folder
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
    losses: Sequence[ScoredImages] = (),
) -> Path:
    """Write the report into a folder, and return the path of ``metrics.json``.

    Args:
        folder: output folder.
        metadata: what was evaluated, such as the model and its step.
        network_scores: scores of the model on its own data.
        image_scores: scores of the images.
        images: the images; None if no metric needs images.
        losses: images of the model's own data with their losses.

    Raises:
        OSError: if a file cannot be written; the message names it.
    """
    packages = installed_versions(PACKAGES)
    method = {"resized_by": RESIZE_METHOD, "interval": INTERVALS, "versions": packages}
    scores = {**network_scores, **image_scores}
    numbers = {name: score_to_json(score) for name, score in scores.items()}
    scored = None
    if images is not None:
        method["format"] = ", ".join(sorted({p.suffix[1:].upper() for p in images.paths}))
        per_image = {n: score.per_sample for n, score in image_scores.items() if score.per_sample}
        scored = in_folder(images, per_image, folder)
    tables = {table.file: table.csv() for table in (scored, *losses) if table is not None}
    for file in CSV_FILES - tables.keys():
        (folder / file).unlink(missing_ok=True)  # of an earlier run
    for file, text in tables.items():
        write_text(folder / file, text)
    write_text(folder / "index.html", html_page(scores, metadata, scored, losses))
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
