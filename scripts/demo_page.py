"""The demo's report: images, loss curves and metrics in one HTML file."""

import base64
import csv
import html
import io
import json
from collections import defaultdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.evaluation.datasets import DatasetImages, run_data
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.loss_plot import LOSS_AT_TIME
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
figure img { display: block; margin: 0 auto; height: 84px; max-width: 100%; object-fit: contain }
figcaption { text-align: center; line-height: 1.2; color: #444 }
.pair figure { width: 84px } .pair { display: inline-block; border: 1px solid #ddd; margin: 3px }
td, th { padding: 2px 14px 2px 0; text-align: left } svg { max-width: 100%; height: auto }
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
            "<h2>Losses</h2>", loss_plots(folder),
            "<h2>Metrics</h2>",
            '<p>Explanations and examples: <a href="evaluation/index.html">evaluation</a>.</p>',
            metrics_table(folder / "evaluation/metrics.json"),
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


def loss_plots(folder: Path) -> str:
    """SVG of the training and validation losses of the three stages over their steps."""
    figure = Figure(figsize=(10.5, 2.8), layout="constrained")
    for axes, stage in zip(figure.subplots(1, 3), "abc", strict=True):
        for name, points in losses(folder / stage).items():
            steps, values = zip(*points, strict=True)
            color, marker = ("#bbb", "") if name == "train/loss" else ("tab:blue", ".")
            axes.plot(steps, values, color=color, marker=marker, label=name)
        axes.set(title=f"Stage {stage.upper()}", xlabel="step", ylabel="loss", yscale="log")
        axes.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def losses(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of the training and validation losses of a run, by name."""
    series = defaultdict(list)
    with (run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] in ("train/loss", "val/loss"):
                series[row["metric"]].append((int(row["step"]), float(row["value"])))
    return series


def metrics_table(path: Path) -> str:
    """HTML table of the metrics with their 95 % intervals, without the losses over t."""
    rows = ""
    for name, score in json.loads(path.read_text())["metrics"].items():
        if LOSS_AT_TIME.fullmatch(name):
            continue
        low, high = score["low"], score["high"]
        interval = "" if low is None else f"{low:.4g} to {high:.4g}"
        rows += f"<tr><th>{name}</th><td>{score['value']:.4g}</td><td>{interval}</td></tr>"
    return f"<table>{rows}</table>"
