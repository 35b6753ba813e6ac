"""Measure a trained cascade: ``python -m wuerstchen_pl.evaluate model=outputs/demo/c``."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from wuerstchen_pl import checkpoint
from wuerstchen_pl.cli import command, output_folder
from wuerstchen_pl.config import check_config
from wuerstchen_pl.metrics.reconstruction import reconstruction
from wuerstchen_pl.metrics.retrieval import pooled_pixels, retrieval, shifted
from wuerstchen_pl.models.vqgan import codebook_use
from wuerstchen_pl.pipeline.draw import Settings, autoencoded, draw, reconstructed
from wuerstchen_pl.pipeline.wuerstchen import WuerstchenPipeline

READ: Mapping[str, Any] = {
    "model": str,
    "metric": list[str],
    "num_captions": int,
    "seed": int,
    "output_dir": str,
    "sample": dict,
    "device": str | None,
    "bf16": bool,
}
METRICS = ("reconstruction", "retrieval")


def run(cfg: DictConfig) -> float:
    """Check, measure, write; returns top-5 retrieval, or else Stage A's PSNR."""
    check_config(cfg, READ)
    unknown = sorted(set(cfg.metric) - set(METRICS))
    if unknown or not cfg.metric:
        raise ValueError(f"metric={list(cfg.metric)} is unknown; choose from {', '.join(METRICS)}")
    if cfg.num_captions < 1:
        raise ValueError(f"num_captions={cfg.num_captions} draws nothing; use at least 1")
    settings: Settings = hydra.utils.instantiate(cfg.sample, _convert_="all")
    folder = output_folder(cfg.output_dir)
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    pipeline = WuerstchenPipeline.from_pretrained(cfg.model, device=device, torch_dtype=dtype)
    data = run_data(Path(cfg.model))

    results: dict[str, Any] = {"model": str(cfg.model), "stage_c": pipeline.source}
    if "reconstruction" in cfg.metric:
        results |= reconstructions(pipeline, data, settings)
    if "retrieval" in cfg.metric:
        results |= retrievals(pipeline, data, settings, cfg.num_captions, cfg.seed)
    path = write_json(folder / "metrics.json", results)
    print(table(results))
    print(path)
    if "retrieval" in results:
        return float(results["retrieval"]["top5"])
    return float(results["stage_a"]["psnr"])


def run_data(model: Path) -> Any:
    """The data module that the run at ``model`` was trained on, from its config.yaml.

    Raises:
        FileNotFoundError: if the run's folder lacks it.
    """
    folder = checkpoint.find(model).parent.parent
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; evaluate reads there what data to measure on")
    config = OmegaConf.to_container(OmegaConf.load(path))
    data = checkpoint.build(config["data"])  # type: ignore[index, call-overload]
    if hasattr(data, "made_with"):
        raise ValueError(
            f"{folder} was trained from a cache, which holds no pictures to measure on; evaluate a "
            "run that was trained on pictures"
        )
    data.prepare_data()
    data.setup()
    return data


def reconstructions(
    pipeline: WuerstchenPipeline, data: Any, settings: Settings
) -> dict[str, dict[str, float]]:
    """PSNR and SSIM of Stage A and of compressor + B + A on both splits, and codebook use."""

    def pairs(split: str, stage: str) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in tqdm(data.in_order(split), desc=f"stage {stage}, {split}", unit="batch"):
            images = batch["image"]
            if stage == "a":
                yield images, autoencoded(pipeline, images)
            else:
                yield images, reconstructed(pipeline, images, settings.decoder_steps)

    found = {}
    for stage in ("a", "b"):
        found[f"stage_{stage}"] = reconstruction(pairs("val", stage))
        found[f"stage_{stage}_train"] = reconstruction(pairs("train", stage))
    images = (batch["image"] for batch in data.in_order("train"))
    found["codebook"] = codes_used(pipeline, images)
    return found


@torch.no_grad()
def codes_used(pipeline: WuerstchenPipeline, batches: Iterable[Tensor]) -> dict[str, float]:
    """Pictures, (B, 3, H, W) in [0, 1] each -> perplexity, dead codes and size of the book."""
    vqgan = pipeline.decoder.vqgan
    uses = torch.zeros(vqgan.quantizer.codebook.num_embeddings)
    for images in batches:
        indices = vqgan.quantizer.indices(vqgan.features(images.to(pipeline.place.device)))
        uses += torch.bincount(indices.flatten().cpu(), minlength=len(uses))
    perplexity, dead = codebook_use(uses)
    return {"perplexity": float(perplexity), "dead": float(dead), "codes": len(uses)}


def retrievals(
    pipeline: WuerstchenPipeline, data: Any, settings: Settings, num_captions: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Draw training captions, and look for each picture among all training pictures.

    By average-pooled pixels and by semantic latents, each beside the same with captions shuffled.
    """
    pictures, captions = [], []
    for batch in data.in_order("train"):
        pictures += list(batch["image"])
        captions += batch["caption"]
    # spread over the set, so that no bucket is left out
    count = min(num_captions, len(pictures))
    own = [i * len(pictures) // count for i in range(count)]
    drawn = draw_like(pipeline, pictures, captions, own, settings, seed)

    spaces = {"": pooled_pixels, "_semantic": lambda p: pooled_semantic(pipeline, p)}
    found: dict[str, dict[str, Any]] = {}
    for suffix, features in spaces.items():
        reference, ours = features(pictures), features(drawn)
        found[f"retrieval{suffix}"] = retrieval(ours, reference, own)
        found[f"retrieval{suffix}_shuffled"] = retrieval(ours, reference, shifted(own))
    found["retrieval"] |= {"captions": count, "pictures": len(pictures)}
    return found


def draw_like(
    pipeline: WuerstchenPipeline,
    pictures: list[Tensor],
    captions: list[str],
    chosen: list[int],
    settings: Settings,
    seed: int,
) -> list[Tensor]:
    """Draw the captions of the ``chosen`` pictures, each at its picture's size, in their order."""
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in chosen:
        by_size[(pictures[index].shape[-2], pictures[index].shape[-1])].append(index)
    drawn: dict[int, Tensor] = {}
    with tqdm(total=len(chosen), desc="drawing captions", unit="picture") as bar:
        for (height, width), indices in by_size.items():
            images = draw(
                pipeline,
                [captions[i] for i in indices],
                seeds=[seed + i for i in indices],
                height=height,
                width=width,
                settings=settings,
            )
            for index, image in zip(indices, images, strict=True):
                drawn[index] = image
                bar.update()
    return [drawn[index] for index in chosen]


def pooled_semantic(pipeline: WuerstchenPipeline, pictures: Iterable[Tensor]) -> Tensor:
    """Pictures (3, H, W) of any size -> (N, S * 4 * 4) average-pooled semantic latents."""
    rows = [pipeline.encode(picture[None])[0].float().cpu() for picture in pictures]
    pooled = [torch.nn.functional.adaptive_avg_pool2d(row, 4).flatten() for row in rows]
    return torch.stack(pooled)


def write_json(path: Path, results: dict[str, Any]) -> Path:
    """Write results whole, or not at all.

    Raises:
        OSError: if they cannot be written, naming the path.
    """
    aside = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    return path


def table(results: dict[str, Any]) -> str:
    """The numbers for the terminal, a line each."""
    rows = [
        f"{group:28s} {name:12s} {value:10.4g}"
        for group, numbers in results.items()
        if isinstance(numbers, dict)
        for name, value in numbers.items()
        if isinstance(value, int | float)
    ]
    return "\n".join(rows)


main = command("evaluate", run)

if __name__ == "__main__":
    main()
