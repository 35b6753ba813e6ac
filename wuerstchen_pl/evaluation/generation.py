"""Generate images for prompts into a folder: resumable, and split over processes."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from wuerstchen_pl.distributed.launch import DistInfo
from wuerstchen_pl.evaluation.image_folder import MANIFEST
from wuerstchen_pl.io.images import write_png
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.pipelines.generate import generate_images
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.plural import plural
from wuerstchen_pl.sampling.config import SamplingConfig

STALL_TIMEOUT_S = 600.0
"""Seconds without a new image after which the other processes are considered dead."""


class GenerationRequest(NamedTuple):
    """An image to be generated."""

    prompt: str
    seed: int
    height: int
    width: int


def generate_into(
    folder: Path,
    requests: Sequence[GenerationRequest],
    pipeline: TextToImage,
    settings: SamplingConfig,
    metadata: dict[str, Any],
    process: DistInfo,
) -> None:
    """Generate this process's share of the missing images; rank 0 waits for all of them.

    An image is written atomically as ``<index of its prompt>-<seed>.png``.

    Args:
        folder: output folder.
        requests: the images of all processes, in order.
        pipeline: generates the images.
        settings: steps, guidance, sampler.
        metadata: what else the images depend on, such as the sha256 of the weights.
        process: rank and world size of this process.

    Raises:
        ValueError: if a size or prompt is not supported, or the folder contains images that were
            generated with other settings.
        OSError: if an image cannot be written.
    """
    for height, width in {(request.height, request.width) for request in requests}:
        pipeline.padded_size(height, width)
    for request in requests:
        pipeline.prior.text_encoder.check(request.prompt)
    # the batch size does not affect the images
    sampling = {key: value for key, value in asdict(settings).items() if key != "batch_size"}
    made_with = {
        "prompts": [request.prompt for request in requests],
        "seeds": [request.seed for request in requests],
        "sizes": [[request.height, request.width] for request in requests],
        **metadata,
        **sampling,
    }
    paths = [folder / file_name(index, request) for index, request in enumerate(requests)]
    # split by index and not by what is missing: another process may have started already
    share = range(process.rank, len(paths), process.world_size)
    is_owner = process.rank == 0
    with claimed(folder, key="output_dir", settings=made_with, record=MANIFEST, is_owner=is_owner):
        missing = [index for index in share if not paths[index].is_file()]
        _generate({paths[i]: requests[i] for i in missing}, pipeline, settings, metadata)
        if process.rank == 0:
            _wait_for(paths)


def _generate(
    requests: dict[Path, GenerationRequest],
    pipeline: TextToImage,
    settings: SamplingConfig,
    metadata: dict[str, Any],
) -> None:
    """Generate images, batched by size, and write each to its path."""
    by_size: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for path, request in requests.items():
        by_size[request.height, request.width].append(path)
    with tqdm(total=len(requests), desc="generating", unit="image", disable=not requests) as bar:
        for (height, width), paths in by_size.items():
            images = generate_images(
                pipeline,
                [requests[path].prompt for path in paths],
                seeds=[requests[path].seed for path in paths],
                height=height,
                width=width,
                settings=settings,
            )
            for path, image in zip(paths, images, strict=True):
                prompt_metadata = {"prompt": requests[path].prompt, "seed": requests[path].seed}
                write_png(path, image, {**prompt_metadata, **metadata})
                bar.update()


def file_name(index: int, request: GenerationRequest) -> str:
    """The file name of an image: index of its prompt, and seed."""
    return f"{index:06d}-{request.seed}.png"


def _wait_for(paths: Sequence[Path]) -> None:
    """Wait until the other processes have written their images.

    Raises:
        TimeoutError: if no new image appears for ``STALL_TIMEOUT_S``.
    """
    missing, since = len(paths), time.monotonic()
    while left := sum(not path.is_file() for path in paths):
        if left < missing:
            missing, since = left, time.monotonic()
        if time.monotonic() - since > STALL_TIMEOUT_S:
            raise TimeoutError(
                f"{paths[0].parent} lacks {plural(left, 'image')} that other processes should have "
                "generated; run the command again, which generates only the missing ones"
            )
        time.sleep(0.2)
