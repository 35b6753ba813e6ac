"""Generates the images of prompts in a folder; existing ones are kept, processes share the work."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from wuerstchen_pl.distributed.launch import DistInfo
from wuerstchen_pl.evaluation.image_folder import MANIFEST
from wuerstchen_pl.io.atomic import write_text
from wuerstchen_pl.io.images import write_png
from wuerstchen_pl.pipelines.cascade import CascadePipeline
from wuerstchen_pl.pipelines.generate import SamplingConfig, generate_images

STALL_TIMEOUT_S = 600.0
"""Seconds in which another process has to have drawn something, or is thought to be dead."""


class GenerationRequest(NamedTuple):
    """An image to be drawn."""

    prompt: str
    seed: int
    height: int
    width: int


def generate_into(
    folder: Path,
    wanted: Sequence[GenerationRequest],
    pipeline: CascadePipeline,
    settings: SamplingConfig,
    facts: dict[str, Any],
    process: DistInfo,
) -> None:
    """Draw this process's share of the images that are not there yet; the first waits for all.

    An image is ``<number of its prompt>-<seed>.png``, and appears whole or not at all.

    Args:
        folder: for the images.
        wanted: all of them, in order.
        pipeline: draws them.
        settings: steps, guidance, sampler.
        facts: what images depend on besides, such as the weights' hash.
        process: which one this is.

    Raises:
        ValueError: if a size or prompt cannot be drawn, or the folder holds images that were
            drawn otherwise.
        OSError: if an image cannot be written.
    """
    for height, width in {(each.height, each.width) for each in wanted}:
        pipeline.padded_size(height, width)
    for each in wanted:
        pipeline.prior.text_encoder.check(each.prompt)
    # the number drawn at once changes no image
    how = {key: value for key, value in vars(settings).items() if key != "batch_size"}
    claim_folder(folder, wanted, {**facts, **how}, process)
    paths = [folder / file_name(number, each) for number, each in enumerate(wanted)]
    # by number, and not by what is missing: another process may have begun
    share = range(process.rank, len(paths), process.world_size)
    own = [number for number in share if not paths[number].is_file()]
    _draw({paths[n]: wanted[n] for n in own}, pipeline, settings, facts)
    if process.rank == 0:
        _wait_for(paths)


def _draw(
    own: dict[Path, GenerationRequest],
    pipeline: CascadePipeline,
    settings: SamplingConfig,
    facts: dict[str, Any],
) -> None:
    """Draw images, those of one size together, and write each to its path."""
    by_size: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for path, each in own.items():
        by_size[each.height, each.width].append(path)
    with tqdm(total=len(own), desc="drawing", unit="image", disable=not own) as bar:
        for (height, width), paths in by_size.items():
            images = generate_images(
                pipeline,
                [own[path].prompt for path in paths],
                seeds=[own[path].seed for path in paths],
                height=height,
                width=width,
                settings=settings,
            )
            for path, image in zip(paths, images, strict=True):
                prompt_facts = {"prompt": own[path].prompt, "seed": own[path].seed}
                write_png(path, image, {**prompt_facts, **facts})
                bar.update()


def file_name(number: int, wanted: GenerationRequest) -> str:
    """The name of an image's file."""
    return f"{number:06d}-{wanted.seed}.png"


def claim_folder(
    folder: Path, wanted: Sequence[GenerationRequest], facts: dict[str, Any], process: DistInfo
) -> None:
    """Note what a folder's images are drawn from, or see that it is the same.

    Raises:
        ValueError: if they were drawn from something else.
    """
    path = folder / MANIFEST
    content = {
        "prompts": [each.prompt for each in wanted],
        "seeds": [each.seed for each in wanted],
        "sizes": [[each.height, each.width] for each in wanted],
        **facts,
    }
    content = json.loads(json.dumps(content))
    if not path.is_file() or not any(folder.glob("*.png")):  # or of a command that drew nothing
        if process.rank == 0:
            write_text(path, json.dumps(content, indent=1, ensure_ascii=False))
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged; choose another output_dir") from error
    differing = [k for k in {**content, **there} if there.get(k) != content.get(k)]
    if differing:
        raise ValueError(
            f"{folder} holds images of other {', '.join(differing)}; choose another output_dir, "
            "or remove them"
        )


def _wait_for(paths: Sequence[Path]) -> None:
    """Until the other processes have drawn theirs.

    Raises:
        TimeoutError: if none came for ten minutes.
    """
    missing, since = len(paths), time.monotonic()
    while left := sum(not path.is_file() for path in paths):
        if left < missing:
            missing, since = left, time.monotonic()
        if time.monotonic() - since > STALL_TIMEOUT_S:
            raise TimeoutError(
                f"{paths[0].parent} lacks {left} images that other processes were to draw; run "
                "the command again, which draws only these"
            )
        time.sleep(0.2)
