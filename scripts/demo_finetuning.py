"""Fine-tune the demo's model on 20 drawings, and measure: ``make demo-finetuning``.

Before: ``make demo``. An adapter learns a style, line art, from 20 drawings, and is measured on
captions that it never saw in that style. Two more adapters learn 20 vehicles, with and without
prior preservation, and are measured on them and on the drawings of the demo's model.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scripts.demo import run
from scripts.finetuning_images import demo_drawings, vehicles, write_images
from wuerstchen_pl.data.sources.openmoji import select
from wuerstchen_pl.evaluation.datasets import DatasetImages, data_from_yaml
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.metrics.retrieval import pooled_pixels
from wuerstchen_pl.io.images import to_float

ROOT = Path("outputs/finetuning")
BASE = Path("outputs/demo/c")
NUM_IMAGES = 20
NUM_UNSEEN = 100
SETTINGS = [
    "adamw.lr=1e-3",
    "stage.adapter.targets=['*.attention.*','*.cond_mapper','*.res.*']",
]
"""The demo's networks are 500 times smaller than the published ones, and learn at higher rates."""


def main() -> None:
    """Write the images, tune, evaluate, and print the figures."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not BASE.is_dir():
        raise SystemExit(f"{BASE} is missing; run make demo first")
    start = time.monotonic()
    write_all_images()
    style, objects = ["dog", "banana", "turtle"], ["dog", "tractor", "ambulance"]
    tune("line-art", "lora", "line-art", style)
    longer, captions = "trainer.max_steps=2000", f"stage.preservation.captions={ROOT}/captions.txt"
    kept = [captions, "stage.preservation.num_class_images=256"]
    tune("vehicles", "lora", "vehicles", objects, longer)
    tune("vehicles-preserved", "dreambooth", "vehicles", objects, longer, *kept)
    figures: dict[str, Any] = {}
    for name in ("base", "line-art"):
        figures[f"{name}, unseen line art"] = evaluate(name, "line-art-unseen")
    for name in ("base", "vehicles", "vehicles-preserved"):
        figures[f"{name}, vehicles"] = evaluate(name, "vehicles")
        figures[f"{name}, drawings of the base"] = evaluate(name, "base")
    figures["minutes"] = (time.monotonic() - start) / 60
    (ROOT / "figures.json").write_text(json.dumps(figures, indent=2))
    write_strips("line-art")
    write_strips("vehicles-preserved")
    for name, values in figures.items():
        print(f"{name:45s} {values}")


def write_all_images() -> None:
    """Folders of images with captions, and the data configs of those that are only evaluated."""
    shutil.rmtree(ROOT, ignore_errors=True)
    chosen = demo_drawings()
    seen = select(chosen, None, NUM_IMAGES)
    unseen = [d for d in select(chosen, None, NUM_IMAGES + NUM_UNSEEN) if d not in seen]
    write_images(ROOT / "line-art", seen, line_art=True)
    write_images(ROOT / "line-art-unseen", unseen, line_art=True)
    write_images(ROOT / "colored-unseen", unseen)
    write_images(ROOT / "vehicles", vehicles(NUM_IMAGES))
    for name in ("line-art-unseen", "colored-unseen", "vehicles"):
        config = {
            "_target_": "wuerstchen_pl.data.factories.folder", "root": f"{ROOT}/{name}",
            "image_size": 64, "batch_size": 20, "val_fraction": 0.0, "num_workers": 0,
        }  # fmt: skip
        (ROOT / f"{name}.yaml").write_text(json.dumps(config))
    (ROOT / "captions.txt").write_text("\n".join(drawing.caption for drawing in chosen))


def tune(name: str, experiment: str, images: str, prompts: list[str], *more: str) -> None:
    """Train an adapter of the demo's model on a folder of images."""
    run(
        "train", "stage=c", f"experiment={experiment}", f"init_from={BASE}",
        f"data.root={ROOT}/{images}", f"name=finetuning/{name}",
        f"sample_prompts=[{','.join(prompts)}]", *SETTINGS, *more,
    )  # fmt: skip


def evaluate(name: str, data: str) -> dict[str, float]:
    """Retrieval of a model's images for the captions of a dataset, in percent."""
    model = BASE if name == "base" else ROOT / name / "c"
    prompts = BASE / "config.yaml" if data == "base" else ROOT / f"{data}.yaml"
    folder = ROOT / f"evaluation/{name}-{data}"
    run(
        "evaluate", f"model={model}", "metric=[retrieval]", f"prompts={prompts}",
        f"output_dir={folder}",
    )  # fmt: skip
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    figures = {
        key: 100 * metrics[f"retrieval/{key}"]["value"] for key in ("top1", "top5")
    }  # fmt: skip
    if data == "line-art-unseen":
        figures["nearer to line art"] = 100 * share_of_line_art(ImageFolder(folder / "images"))
    return figures


def share_of_line_art(generated: ImageFolder) -> float:
    """How many images are nearer to their caption's line art than to its colored drawing."""
    line_art, colored = (
        reference_features(ROOT / f"{kind}-unseen.yaml") for kind in ("line-art", "colored")
    )
    prompts = generated.prompts or []
    features = pooled_pixels(map(to_float, generated))
    nearer = [
        torch.dist(image, line_art[prompt]) < torch.dist(image, colored[prompt])
        for image, prompt in zip(features, prompts, strict=True)
    ]
    return sum(map(float, nearer)) / len(nearer)


def reference_features(yaml: Path) -> dict[str, torch.Tensor]:
    """Caption -> pooled pixels of its image."""
    images = DatasetImages(data_from_yaml(yaml))
    captions = [image.caption for image in images.captioned(None)]
    features = pooled_pixels(map(to_float, images))
    return dict(zip(captions, features, strict=True))


def write_strips(name: str) -> None:
    """The strips of a run's prompts in one image."""
    strips = [Image.open(path) for path in sorted((ROOT / name / "c/samples").glob("*.png"))]
    canvas = Image.new("RGB", (max(s.width for s in strips), sum(s.height for s in strips)))
    top = 0
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height
    canvas.save(ROOT / f"{name}.png")


if __name__ == "__main__":
    main()
