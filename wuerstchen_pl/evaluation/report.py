"""What was found, as ``metrics.json``, ``scores.csv``, ``index.html`` and a table."""

import csv
import html
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wuerstchen_pl.evaluation.folder import Folder
from wuerstchen_pl.metrics.networks import RESIZED
from wuerstchen_pl.metrics.score import Score

PACKAGES = ("wuerstchen_pl", "torch", "torchvision", "torchmetrics", "torch-fidelity",
            "open_clip_torch", "pillow")  # fmt: skip
NAMING = ("model", "run", "step", "images")
"""Facts that a page is titled with."""
SHOWN = 8
"""Best and worst pictures of each score."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
figure { display: inline-block; margin: 4px; width: 128px; vertical-align: top; font-size: 12px }
figure img { display: block; margin: 0 auto; max-width: 128px; max-height: 128px }
figcaption { text-align: center; line-height: 1.2; color: #444; overflow-wrap: anywhere }
td, th { padding: 2px 14px 2px 0; text-align: left } .number { text-align: right }
"""


def write(
    folder: Path,
    facts: dict[str, Any],
    of_networks: Mapping[str, Score],
    of_drawn: Mapping[str, Score],
    pictures: Folder | None,
) -> Path:
    """Write the report into a folder; returns the path of ``metrics.json``.

    Args:
        folder: for the files.
        facts: what was measured, such as the model.
        of_networks: scores of the model on its own data.
        of_drawn: scores of the pictures.
        pictures: None if none were wanted.

    Raises:
        OSError: if a file cannot be written, naming it.
    """
    packages = {name: version(name) for name in PACKAGES}
    method = {"resized_by": RESIZED, "interval": "95 %, bootstrap", "versions": packages}
    scores = {**of_networks, **of_drawn}
    numbers = {name: of_json(score) for name, score in scores.items()}
    of_pictures = {name: score.each for name, score in of_drawn.items() if score.each}
    if pictures is not None:
        method["format"] = ", ".join(sorted({p.suffix[1:].upper() for p in pictures.paths}))
        _write(folder / "scores.csv", table_of_pictures(pictures, of_pictures))
    else:
        (folder / "scores.csv").unlink(missing_ok=True)  # of another command
    _write(folder / "index.html", page(scores, facts, pictures, of_pictures, folder))
    content = {**facts, **method, "metrics": numbers}
    return _write(folder / "metrics.json", json.dumps(content, indent=2, allow_nan=False) + "\n")


def of_json(score: Score) -> dict[str, Any]:
    """A score without its pictures."""
    told: dict[str, Any] = {
        "value": score.value,
        "low": score.low,
        "high": score.high,
        "number": score.number,
    }
    finite = {k: v if v is None or math.isfinite(v) else None for k, v in told.items()}
    return finite | score.facts


def table(scores: Mapping[str, Score]) -> str:
    """The numbers for the terminal, a line each."""
    width = max(map(len, scores))
    return "\n".join(
        f"{name:{width}s} {score.value:10.4g}  {_interval(score):24s} {score.number} pictures"
        for name, score in scores.items()
    )


def _interval(score: Score) -> str:
    return "" if score.low is None else f"{score.low:.4g} to {score.high:.4g}"


def table_of_pictures(pictures: Folder, of_pictures: Mapping[str, Sequence[float]]) -> str:
    """Each picture's scores as CSV."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "prompt", *of_pictures])
    for number, path in enumerate(pictures.paths):
        prompt = pictures.prompts[number] if pictures.prompts else ""
        rows.writerow([path.name, prompt, *(each[number] for each in of_pictures.values())])
    return text.getvalue()


def page(
    scores: Mapping[str, Score],
    facts: dict[str, Any],
    pictures: Folder | None,
    of_pictures: Mapping[str, Sequence[float]],
    folder: Path,
) -> str:
    """The numbers, and the best and worst pictures by each score that pictures have."""
    title = html.escape(" ".join(f"{k} {facts[k]}" for k in NAMING if facts.get(k) is not None))
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td class=number>{score.value:.4g}</td>"
        f"<td>{_interval(score)}</td><td class=number>{score.number}</td></tr>"
        for name, score in scores.items()
    )
    head = "<tr><th></th><th></th><th>95 %</th><th>pictures</th></tr>"
    parts = [f"<h1>{title}</h1><table>{head}{rows}</table>"]
    for name, each in of_pictures.items() if pictures is not None else ():
        assert pictures is not None
        order = sorted(range(len(each)), key=lambda number: -each[number])
        for told, chosen in (("best", order[:SHOWN]), ("worst", order[::-1][:SHOWN])):
            figures = "".join(_figure(pictures, n, each[n], folder) for n in chosen)
            parts.append(f"<h2>{told} by {html.escape(name)}</h2><div>{figures}</div>")
    style = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html>{style}{''.join(parts)}\n"


def _figure(pictures: Folder, number: int, value: float, folder: Path) -> str:
    source = html.escape(os.path.relpath(pictures.paths[number], folder))
    prompt = html.escape(pictures.prompts[number] if pictures.prompts else "")
    caption = f"{prompt}<br>{value:.4g}"
    return f'<figure><img alt="{prompt}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def _write(path: Path, text: str) -> Path:
    aside = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    return path
