"""Time loading batches from JPEG shards, against plain WebDataset with torchvision.

One-megapixel images of six shapes with the power spectrum of photographs; batches of about
512 x 512. One process on one core, like a data loader worker.
"""

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode, RandomCrop
from torchvision.transforms.functional import resize as torchvision_resize

from scripts.timing import side_by_side, write_table
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.loading.transforms import CENTER, crop_box, resize
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.io.images import decode_image, to_float

SHAPES = ((1024, 1024), (1152, 896), (896, 1152), (1216, 832), (832, 1216), (1344, 768))
SIDE, BATCH = 512, 16


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """Random image whose amplitudes fall with frequency, like those of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(height, width)) ** 1.2
    planes = []
    for _ in range(3):
        phase = np.exp(2j * np.pi * rng.random(amplitude.shape))
        plane = np.fft.irfft2(amplitude * phase, s=(height, width))
        planes.append((plane - plane.mean()) / plane.std())
    gray = planes[0]
    color = np.stack([gray + 0.3 * plane for plane in planes], axis=-1)
    return Image.fromarray((127 + 55 * color).clip(0, 255).astype(np.uint8))


def write_shards(folder: Path, count: int) -> list[bytes]:
    """Write two shards of captioned images; returns the encoded JPEGs."""
    images = []
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(count // 2):
                width, height = SHAPES[i % len(SHAPES)]
                buffer = io.BytesIO()
                photograph(height, width, shard * count + i).save(buffer, "JPEG", quality=90)
                images.append(buffer.getvalue())
                metadata = json.dumps({"width": width, "height": height}).encode()
                members = {"jpg": images[-1], "txt": b"a photograph", "json": metadata}
                for suffix, data in members.items():
                    entry = tarfile.TarInfo(f"{shard:05d}{i:04d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return images


def package_batches(folder: Path, **buckets: object) -> Iterator[dict]:
    """The batches of this package, endlessly, with images in float32 as those of WebDataset."""
    module = ImageTextDataModule(
        source=ShardSource(urls=str(folder)),
        image_size=SIDE,
        batch_size=BATCH,
        **buckets,  # type: ignore[arg-type]
    )
    module.prepare_data()
    module.setup()
    loader = module.train_dataloader()
    while True:
        for batch in loader:
            yield {**batch, "image": to_float(batch["image"])}


def webdataset_batches(folder: Path) -> Iterator[dict]:
    """WebDataset's batches, endlessly: decoded, resized with antialiasing, cropped to a square."""
    crop = RandomCrop(SIDE)

    def prepare(sample: dict) -> dict:
        data = torch.frombuffer(bytearray(sample["jpg"]), dtype=torch.uint8)
        image = decode_jpeg(data, mode=ImageReadMode.RGB)
        image = torchvision_resize(
            image, [SIDE], interpolation=InterpolationMode.BICUBIC, antialias=True
        )
        return {"image": crop(image).float() / 255, "caption": sample["txt"].decode()}

    urls = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(urls, shardshuffle=2).shuffle(1000).map(prepare)
    while True:
        yield from DataLoader(data, batch_size=BATCH, drop_last=True)


def consume(batches: Iterator[dict], count: int) -> None:
    """Load ``count`` batches and discard them."""
    for _ in islice(batches, count):
        pass


def center_crop(img: np.ndarray) -> np.ndarray:
    """Crop the center of an image and resize it to the size of a batch."""
    height, width = img.shape[:2]
    return resize(img, crop_box(height, width, (SIDE, SIDE), CENTER), (SIDE, SIDE))


def decoders() -> dict[str, Callable[[bytes], object]]:
    """Ways to get 512 x 512 pixels from a JPEG, by name."""

    def package(data: bytes) -> np.ndarray:
        img = decode_image(data, cover=(SIDE, SIDE))
        return center_crop(img)

    def pil(data: bytes) -> np.ndarray:
        img = Image.open(io.BytesIO(data)).convert("RGB")
        box = crop_box(img.height, img.width, (SIDE, SIDE), CENTER)
        return np.asarray(img.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))

    def torchvision(data: bytes) -> torch.Tensor:
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return torchvision_resize(
            image, [SIDE], interpolation=InterpolationMode.BICUBIC, antialias=True
        )

    def reduced(data: bytes) -> np.ndarray:
        pixels = simplejpeg.decode_jpeg(data, min_height=SIDE, min_width=SIDE, min_factor=1)
        return center_crop(pixels)

    return {
        "simplejpeg, torch on bytes (ours)": package,
        "simplejpeg at any eighth, torch on bytes": reduced,
        "PIL": pil,
        "torchvision": torchvision,
    }


def run(rounds: int, count: int = 192) -> Path:
    """Run the benchmark and write its table; returns the path."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        images = write_shards(Path(name), count)
        peer = webdataset_batches(Path(name))
        batches = 6
        square = {"buckets": "sizes", "sizes": [[SIDE, SIDE]]}
        for label, settings in (("area buckets", {}), ("one square", square)):
            loader = package_batches(Path(name), **settings)
            timing = side_by_side(
                partial(consume, peer, batches), partial(consume, loader, batches), rounds
            )
            rate = batches * BATCH * 1000
            rows.append(
                f"| {label} | {rate / timing.reference_ms:.1f} | {rate / timing.package_ms:.1f} "
                f"| {timing.ratio:.2f} |"
            )
            print(rows[-1], flush=True)
        for label, work in decoders().items():
            start = time.perf_counter()
            for data in images[:96]:
                work(data)
            images_per_second = 96 / (time.perf_counter() - start)
            rows.append(f"| decode and resize alone: {label} | | {images_per_second:.1f} | |")
            print(rows[-1], flush=True)
    kilobytes = sum(map(len, images)) // count // 1000
    return write_table(
        "data",
        "python scripts/bench.py data",
        "Images per second per core, from JPEG shards to float batches of 16; images have one "
        f"megapixel and about {kilobytes} KB. Medians of {rounds} alternating rounds. WebDataset "
        "crops squares, with torchvision's decoder and antialiased bicubic resizing.",
        "| batches | WebDataset + torchvision | ours | ratio |",
        rows,
    )
