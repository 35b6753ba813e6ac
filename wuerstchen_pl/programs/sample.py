"""Generate images from text."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig, ListConfig
from tqdm import tqdm

from wuerstchen_pl.cli.jobs import check_output_dir
from wuerstchen_pl.distributed.launch import resolve_device
from wuerstchen_pl.evaluation import prompt_sets
from wuerstchen_pl.formats.adapter_files import split_weight
from wuerstchen_pl.io.image_files import GRID, slug
from wuerstchen_pl.io.images import write_png
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.pipelines.controlnet import WithControlNet
from wuerstchen_pl.pipelines.duration import estimate_seconds
from wuerstchen_pl.pipelines.generate import generate_images
from wuerstchen_pl.pipelines.loading import load_pipeline
from wuerstchen_pl.pipelines.lora import WithAdapters
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.pipelines.words import WithWords
from wuerstchen_pl.plural import plural
from wuerstchen_pl.sampling.config import SamplingConfig
from wuerstchen_pl.sampling.device import dtype_name, log_dtype, sampling_dtype

LONG = 120
"""A run that is estimated to take more seconds than this says so before it starts."""
MAX_IMAGES = 10_000
"""Upper limit of images per prompt."""


def run(cfg: DictConfig) -> None:
    """Check the settings, then generate images, and write each as soon as it is done."""
    prompts = read_prompts(cfg.prompt, cfg.prompts)
    settings: SamplingConfig = hydra.utils.instantiate(cfg.sample, _convert_="all")
    if not 1 <= cfg.num_images_per_prompt <= MAX_IMAGES:
        raise ValueError(
            f"num_images_per_prompt={cfg.num_images_per_prompt} is out of range; "
            f"use 1 to {MAX_IMAGES}"
        )
    if not 0 <= cfg.seed < 2**63 - MAX_IMAGES:
        raise ValueError(f"seed={cfg.seed} is out of range; use 0 to {2**63 - MAX_IMAGES - 1}")
    folder = check_output_dir(cfg.output_dir)
    with claimed(folder, key="output_dir"):
        generate(cfg, prompts, settings, folder)


def generate(cfg: DictConfig, prompts: list[str], settings: SamplingConfig, folder: Path) -> None:
    """Load the pipeline and write the images."""
    device = resolve_device(cfg.device)
    dtype = sampling_dtype(cfg.dtype, device)
    pipeline = load_pipeline(
        cfg.model,
        prior=cfg.prior,
        variant=cfg.variant,
        allow_mismatch=cfg.allow_mismatch,
        device=device,
        dtype=dtype,
    )
    load_controlnet(pipeline, cfg)
    load_adapters(pipeline, cfg.lora)
    load_words(pipeline, cfg.words)
    requests = [
        (prompt, cfg.seed + i) for prompt in prompts for i in range(cfg.num_images_per_prompt)
    ]
    texts, seeds = [p for p, _ in requests], [s for _, s in requests]
    for prompt in prompts:
        pipeline.prior.text_encoder.check(prompt)
    height, width = pipeline.size(cfg.height, cfg.width)
    pipeline.padded_size(height, width)
    control = None
    if isinstance(pipeline, WithControlNet):
        control = pipeline.control(cfg.control_image, cfg.control_scale, height, width)
    log_dtype(dtype, device)
    seconds = estimate_seconds(pipeline, len(requests), height, width, settings, control)
    if seconds > LONG:
        print(
            f"{plural(len(requests), 'image')} of {height} x {width} px: about "
            f"{seconds / 60:.0f} minutes on {device}"
        )
    if cfg.compile:  # not before, as it would also compile for the size that is timed
        pipeline.compile()

    images = generate_images(
        pipeline, texts, seeds=seeds, height=height, width=width, settings=settings, control=control
    )
    metadata: dict[str, Any] = {"model": str(cfg.model), **_sha256(pipeline)}
    optional = ("prior", "variant", "controlnet", "control_image")
    metadata |= {key: cfg[key] for key in optional if cfg[key] is not None}
    metadata |= {} if control is None else {"control_scale": cfg.control_scale}
    metadata |= {key: list(cfg[key]) for key in ("lora", "words") if cfg[key]}
    metadata |= {"height": height, "width": width, "dtype": dtype_name(dtype)}
    metadata |= asdict(settings)
    grid_images: list[torch.Tensor] = []  # the only images that are kept in memory
    for number, image in enumerate(tqdm(images, total=len(requests), unit="image")):
        prompt, seed = requests[number]
        name = f"{number:04d}-{slug(prompt)}-{seed}.png"
        write_png(folder / name, image, {"prompt": prompt, "seed": seed, **metadata})
        if cfg.grid:
            grid_images.append(image)
    if len(grid_images) > 1:
        write_png(folder / GRID, tile(grid_images, columns=cfg.num_images_per_prompt), {})
    print(f"{plural(len(requests), 'image')} in {folder}")


def load_controlnet(pipeline: TextToImage, cfg: DictConfig) -> None:
    """Load the ControlNet of ``controlnet``, if it is set.

    Raises:
        ValueError: if the model cannot have one, or it cannot be read.
    """
    for key in ("controlnet", "control_image"):
        if cfg[key] is not None and not isinstance(pipeline, WithControlNet):
            raise ValueError(
                f"{key}={cfg[key]} needs a cascade, but the model is a baseline; remove it"
            )
    if cfg.controlnet is not None:
        cascade = cast(WithControlNet, pipeline)
        cascade.load_controlnet(cfg.controlnet, allow_mismatch=cfg.allow_mismatch)


def load_adapters(pipeline: TextToImage, adapters: Sequence[str]) -> None:
    """Load adapters, each given as its path, or as ``path:weight``.

    Raises:
        ValueError: if the model cannot have adapters, or one cannot be read.
    """
    for number, text in enumerate(adapters):
        if not isinstance(pipeline, WithAdapters):
            raise ValueError(f"lora={text} needs a cascade, but the model is a baseline; remove it")
        path, factor = split_weight(text)
        pipeline.load_lora(path, factor, name=f"{number}: {path}")


def load_words(pipeline: TextToImage, paths: Sequence[str]) -> None:
    """Load new words.

    Raises:
        ValueError: if the model cannot have new words, or a file cannot be read.
    """
    for path in paths:
        if not isinstance(pipeline, WithWords):
            raise ValueError(
                f"words={path} needs a cascade, but the model is a baseline; remove it"
            )
        pipeline.load_words(path)


def _sha256(pipeline: TextToImage) -> dict[str, str]:
    return {} if pipeline.source is None else {"model_sha256": pipeline.source["sha256"]}


def read_prompts(prompt: Any, prompts: str | None) -> list[str]:
    """The prompts of the command line, then those of a file (see ``prompt_sets.read_prompts``).

    Args:
        prompt: one prompt, a list of them, or None.
        prompts: path of a file of prompts, or None.

    Raises:
        ValueError: if there are none, or one is not valid UTF-8.
        FileNotFoundError: if the file is missing.
    """
    from_command_line = list(prompt) if isinstance(prompt, ListConfig) else [prompt]
    texts = [str(p) for p in from_command_line if p is not None]
    if prompts is not None:
        texts += prompt_sets.read_prompts(prompts)
    if not texts:
        raise ValueError('no prompt; set prompt="a red heart", or prompts= to a file of prompts')
    for text in texts:  # Python decodes command-line bytes that are not UTF-8 to lone surrogates
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"prompt={text[:40]!r} is not valid UTF-8; re-encode it as UTF-8")
    return texts


def tile(images: list[torch.Tensor], columns: int) -> torch.Tensor:
    """N images (3, H, W) -> one (3, rows (H+2), columns (W+2)), separated by white lines."""
    if columns == 1:
        columns = min(8, len(images))
    padded = [torch.nn.functional.pad(p, (0, 2, 0, 2), value=1.0) for p in images]
    padded += [torch.ones_like(padded[0])] * (-len(padded) % columns)
    rows = [torch.cat(padded[i : i + columns], dim=2) for i in range(0, len(padded), columns)]
    return torch.cat(rows, dim=1)
