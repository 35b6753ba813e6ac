"""The demo's report: images, loss curves and metrics in one HTML file."""

import base64
import csv
import html
import io
import json
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.evaluation.datasets import DatasetImages, run_data
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.io.images import to_float, to_pil
from wuerstchen_pl.pipelines.generate import autoencode, generate_images, reconstruct
from wuerstchen_pl.programs.sample import tile
from wuerstchen_pl.sampling.images import to_tensor

NUM_TRAINING = 32
NEW_CAPTIONS = (
    "black dog", "white bear", "red fish", "green bird", "tiger cat", "polar fox", "red pepper",
    "green tomato", "black horse", "tropical butterfly", "ice panda", "hot chocolate", "apple pie",
    "strawberry cake", "red mushroom", "pineapple pizza",
)  # fmt: skip
"""New combinations of words from the demo's training captions (animals and food)."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
figure { display: inline-block; margin: 4px; width: 100px; vertical-align: top; font-size: 12px }
figure img { display: block; margin: 0 auto; image-rendering: auto; height: 84px; max-width: 100px;
  object-fit: contain } figcaption { text-align: center; line-height: 1.2; color: #444 }
.pair figure { width: 84px } .pair { display: inline-block; border: 1px solid #ddd; margin: 3px }
td, th { padding: 2px 14px 2px 0; text-align: left } svg { margin-right: 12px; background: #fafafa }
"""


def write_page(folder: Path, *, bf16: bool) -> Path:
    """Generate images with the trained stages in ``folder`` and write ``folder/index.html``."""
    torch.manual_seed(0)
    pipeline = WuerstchenPipeline.from_pretrained(
        str(folder / "c"), torch_dtype=torch.bfloat16 if bf16 else torch.float32
    )
    data = run_data(folder / "c")
    generated = ImageFolder(folder / "evaluation/images")
    count = min(NUM_TRAINING, len(generated))
    indices = [i * len(generated) // count for i in range(count)]
    new_images = list(
        tqdm(
            generate_images(
                pipeline, NEW_CAPTIONS, seeds=range(len(NEW_CAPTIONS)), height=64, width=64
            ),
            total=len(NEW_CAPTIONS),
            desc="generating new captions",
            unit="image",
        )
    )
    body = "\n".join(
        [
            "<h1>Würstchen, trained on this machine</h1>",
            section("New captions", "Words from the training captions, in new combinations.",
                    [figure(p, c) for p, c in zip(new_images, NEW_CAPTIONS, strict=True)]),
            section("Training captions", "Left: the training image. Right: the image generated "
                    "from its caption (Stages C, B, A).",
                    training_pairs(generated, data, indices)),
            section("Reconstructions of validation images", "Input, Stage A, and compressor + "
                    "Stage B + Stage A.", reconstructions(pipeline, data)),
            "<h2>Losses</h2>", *[curve(folder / s, s) for s in "abc"],
            "<h2>Metrics</h2>", metrics_table(folder / "evaluation/metrics.json"),
        ]
    )  # fmt: skip
    page = folder / "index.html"
    head = f"<meta charset=utf-8><title>Würstchen demo</title><style>{STYLE}</style>"
    page.write_text(f"<!doctype html>{head}{body}\n", encoding="utf-8")
    to_pil(tile(new_images, columns=8)).save(folder / "new_captions.png")
    return page


def section(title: str, text: str, items: list[str]) -> str:
    """HTML of a heading, a sentence and images."""
    return f"<h2>{title}</h2><p>{text}</p><div>{''.join(items)}</div>"


def figure(image: Tensor, label: str) -> str:
    """HTML of an image, (3, H, W) in [0, 1], with its label below."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    label = html.escape(label)
    source = f"data:image/png;base64,{data}"
    return f'<figure><img alt="{label}" src="{source}"><figcaption>{label}</figcaption></figure>'


def pair(*labeled: tuple[Tensor, str]) -> str:
    """HTML of labeled images in one frame."""
    return f'<div class="pair">{"".join(figure(*item) for item in labeled)}</div>'


def training_pairs(
    generated: ImageFolder, data: ImageTextDataModule, indices: list[int]
) -> list[str]:
    """A frame per selected image: the training image of its caption, and the generated image."""
    images = DatasetImages(data)
    captioned, training = images.captioned(len(generated)), dict(images.indexed())
    return [
        pair(
            (to_float(training[captioned[i].dataset_index]), "training image"),
            (to_tensor(generated.image(i))[0], captioned[i].caption),
        )
        for i in indices
    ]


def reconstructions(pipeline: WuerstchenPipeline, data: ImageTextDataModule) -> list[str]:
    """A frame per validation image: input, Stage A, and compressor + Stage B + Stage A."""
    frames = []
    for batch in data.in_order("val"):
        images = to_float(batch["image"])
        through_a = autoencode(pipeline, images)
        through_b = reconstruct(pipeline, images, seeds=range(len(images)))
        for original, a, b in zip(images, through_a, through_b, strict=True):
            frames.append(pair((original, "input"), (a, "Stage A"), (b, "Stage B")))
    return frames


def curve(run: Path, stage: str, width: int = 320, height: int = 160) -> str:
    """SVG of a run's training (gray) and validation (blue) loss, on a logarithmic axis."""
    series = defaultdict(list)
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] in ("train/loss", "val/loss"):
                series[row["metric"]].append((int(row["step"]), float(row["value"])))
    values = [v for points in series.values() for _, v in points]
    steps = max(s for points in series.values() for s, _ in points)
    low, high = (torch.tensor(f(values)).log().item() for f in (min, max))
    span = high - low or 1.0  # one logged step has no range
    lines = ""
    for name, color in (("train/loss", "#aaa"), ("val/loss", "#06c")):
        points = " ".join(
            f"{width * s / max(steps, 1):.1f},"
            f"{20 + (height - 30) * (high - torch.tensor(v).log().item()) / span:.1f}"
            for s, v in series[name]
        )
        lines += f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{points}"/>'
    text = f"Stage {stage.upper()}: {min(values):.3g} to {max(values):.3g}, {steps + 1} steps"
    label = f'<text x="6" y="14" font-size="12">{text}</text>'
    return f'<svg width="{width}" height="{height}">{label}{lines}</svg>'


def metrics_table(path: Path) -> str:
    """HTML table of the metrics with their 95 % intervals."""
    rows = ""
    for name, score in json.loads(path.read_text())["metrics"].items():
        low, high = score["low"], score["high"]
        interval = "" if low is None else f"{low:.4g} to {high:.4g}"
        rows += f"<tr><th>{name}</th><td>{score['value']:.4g}</td><td>{interval}</td></tr>"
    return f"<table>{rows}</table>"
