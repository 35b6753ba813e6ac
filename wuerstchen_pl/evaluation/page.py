"""The page of a report, ``index.html``: images, the metrics in groups, and losses per image."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wuerstchen_pl.evaluation.loss_plot import LOSS_AT_TIME, losses_over_time, plot_losses
from wuerstchen_pl.evaluation.metrics.score import Score, format_interval
from wuerstchen_pl.evaluation.scored_images import ScoredImages

TITLE_KEYS = ("model", "run", "step", "images")
"""Metadata keys that form the title of the page."""
NUM_IMAGES = 32
"""Number of images at the top."""
NUM_EXAMPLES = 8
"""Number of best and of worst images shown per metric."""
NUM_LOSSES = 16
"""Number of images with the highest and with the lowest losses that a table lists."""
CONTROL = "_shuffled"
"""Part of the name of a control, by which no image is ranked."""
GROUPS = (
    (
        "Images and a reference",
        r"fid|kid|is|fd_.*|kd_.*",
        "Distances between the images and the reference: lower is better. For is, higher is.",
    ),
    (
        "Images and prompts",
        r"clip|pickscore|win_rate/.*",
        "How well an image matches its prompt: higher is better. A win rate is the share of "
        "prompts for which its score is above the baseline's.",
    ),
    (
        "Retrieval",
        r"retrieval.*",
        "How often the training image of its own caption is the nearest to an image (top1), or "
        "one of the nearest five (top5): higher is better. By chance it would be that of the "
        "shuffled captions.",
    ),
    (
        "Reconstruction",
        r"stage_\w+/(psnr|ssim|lpips|r.*)",
        "How well Stage A, and compressor, Stage B and Stage A, reproduce images of validation "
        "and of training: PSNR (in dB) and SSIM are better if higher, the others if lower.",
    ),
    (
        "Codebook",
        r"codebook/.*",
        "How many codes of Stage A are in use (perplexity), and how many are not (dead).",
    ),
    ("Losses", r"stage_\w+/loss", "The error of the predicted noise: lower is better."),
    ("Other", r".*", "Metrics of no group above."),
)
"""Title, pattern of the names, and explanation; a metric is in the first group that matches."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
figure { display: inline-block; margin: 4px; width: 128px; vertical-align: top; font-size: 12px }
figure img { display: block; margin: 0 auto; max-width: 128px; max-height: 128px }
figcaption { text-align: center; line-height: 1.2; color: #444; overflow-wrap: anywhere }
td, th { padding: 2px 14px 2px 0; text-align: left } .number { text-align: right }
"""


def html_page(
    scores: Mapping[str, Score],
    metadata: dict[str, Any],
    images: ScoredImages | None,
    losses: Sequence[ScoredImages],
) -> str:
    """The page.

    Args:
        scores: all scores by name.
        metadata: what was evaluated.
        images: the images with their scores; None if no metric needs images.
        losses: images of the model's own data with their losses.
    """
    title = html.escape(
        " ".join(f"{k} {metadata[k]}" for k in TITLE_KEYS if metadata.get(k) is not None)
    )
    parts = [f"<h1>{title}</h1>"]
    if images is not None:
        shown, number = range(min(NUM_IMAGES, len(images.names))), len(images.names)
        count = f"The first {len(shown)} of {number}." if number > len(shown) else ""
        figures = "".join(_figure(images, i, "") for i in shown)
        parts.append(f"<h2>Images</h2><p>{count}</p><div>{figures}</div>")
        parts += _extremes(images)
    parts += _groups(scores)
    parts += [_loss_table(split, name) for split in losses for name in split.scores]
    style = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    return f"<!doctype html>{style}{''.join(parts)}\n"


def _extremes(images: ScoredImages) -> list[str]:
    """The images with the highest and the lowest values of each score."""
    parts = []
    for name, values in images.scores.items():
        if CONTROL in name:
            continue
        for label, chosen in extreme_indices(values).items():
            figures = "".join(_figure(images, i, f"<br>{values[i]:.4g}") for i in chosen)
            if chosen:
                parts.append(f"<h2>{label} by {html.escape(name)}</h2><div>{figures}</div>")
    return parts


def extreme_indices(values: Sequence[float]) -> dict[str, list[int]]:
    """Indices of the ``best`` and ``worst`` values, each at most half of them, best or worst first.

    If the values are outcomes (1 is a success, 0 a failure, 1/2 a tie), the best are successes and
    the worst failures.
    """
    order = sorted(range(len(values)), key=lambda index: -values[index])
    if set(values) <= {0.0, 0.5, 1.0}:
        best = [i for i in order if values[i] == 1]
        worst = [i for i in order if values[i] == 0]
    else:
        half = len(order) // 2
        best, worst = order[:half], order[::-1][:half]
    return {"best": best[:NUM_EXAMPLES], "worst": worst[:NUM_EXAMPLES]}


def _figure(images: ScoredImages, index: int, value: str) -> str:
    source, prompt = html.escape(images.sources[index]), html.escape(images.prompts[index])
    caption = f"<figcaption>{prompt}{value}</figcaption>"
    return f'<figure><img alt="{prompt}" src="{source}">{caption}</figure>'


def _loss_table(images: ScoredImages, name: str) -> str:
    """The images with the highest and the lowest losses, highest first."""
    values = images.scores[name]
    order = sorted(range(len(values)), key=lambda index: -values[index])
    cut = len(order) > 2 * NUM_LOSSES
    rows = [_loss_row(images, index, values[index]) for index in order]
    rows = [*rows[:NUM_LOSSES], "<tr><td>...</tr>", *rows[-NUM_LOSSES:]] if cut else rows
    sentence = (
        "The highest losses first. An image whose loss stays high is not learned, or its caption "
        f"does not fit. {images.file} lists all."
    )
    head = "<tr><th></th><th>loss</th><th>caption</th><th>image</th></tr>"
    table = f"<table>{head}{''.join(rows)}</table>"
    return f"<h2>Images by {html.escape(name)}</h2><p>{sentence}</p>{table}"


def _loss_row(images: ScoredImages, index: int, loss: float) -> str:
    texts = (images.sources, images.prompts, images.names)
    source, prompt, name = (html.escape(column[index]) for column in texts)
    return (
        f'<tr><td><img alt="" src="{source}"></td><td class=number>{loss:.4g}</td>'
        f"<td>{prompt}</td><td>{name}</td></tr>"
    )


def _groups(scores: Mapping[str, Score]) -> list[str]:
    """A table per group of metrics, with a sentence; losses over t are a plot."""
    remaining = {name: s for name, s in scores.items() if not LOSS_AT_TIME.fullmatch(name)}
    parts = []
    for title, pattern, explanation in GROUPS:
        members = {name: s for name, s in remaining.items() if re.fullmatch(pattern, name)}
        remaining = {name: s for name, s in remaining.items() if name not in members}
        if members:
            parts.append(f"<h2>{title}</h2><p>{explanation}</p>{_table(members)}")
    if losses := losses_over_time(scores):
        sentence = "The loss at the times t of the diffusion, 0 being data, with 95 % intervals."
        parts.append(f"<h2>Validation loss over t</h2><p>{sentence}</p>{plot_losses(losses)}")
    return parts


def _table(scores: Mapping[str, Score]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td class=number>{score.value:.4g}</td>"
        f"<td>{format_interval(score)}</td><td class=number>{score.number}</td></tr>"
        for name, score in scores.items()
    )
    return f"<table><tr><th></th><th></th><th>95 %</th><th>images</th></tr>{rows}</table>"
