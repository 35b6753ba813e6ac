"""Time the order of batches in the main process, with and without the indexes of the shards.

Shards as img2dataset writes them, except that their images are a few bytes: none is read. The main
process lists all samples, filters them with the paper's limits, and fills the buckets.
"""

import io
import json
import random
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import torch

from scripts.timing import write_table
from wuerstchen_pl.data.ordering.batches import Batches
from wuerstchen_pl.data.ordering.buckets import Buckets
from wuerstchen_pl.data.ordering.filters import Filters
from wuerstchen_pl.data.ordering.prefetch import ShardPrefetcher
from wuerstchen_pl.data.ordering.stats import DataStats
from wuerstchen_pl.data.ordering.stream import Mixture, Stream
from wuerstchen_pl.data.sources.shards import ShardSource
from wuerstchen_pl.data.sources.source import Holdout

SHARDS, SAMPLES, BATCH = 8, 2000, 128
WORDS = ("a", "photo", "of", "the", "old", "café", "in", "red", "mountains", "with", "people")


def write_shards(folder: Path) -> None:
    """Write shards with img2dataset's metadata."""
    rng = random.Random(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(SAMPLES):
                key = f"{shard:05d}{i:04d}"
                caption = " ".join(rng.choices(WORDS, k=12))
                width, height = rng.randint(512, 2048), rng.randint(512, 2048)
                metadata = {
                    "caption": caption, "url": f"https://example.com/{rng.random()}.jpg",
                    "key": key, "status": "success", "error_message": None, "exif": "{}",
                    "width": width, "height": height, "original_width": width,
                    "original_height": height, "sha256": f"{rng.getrandbits(256):064x}",
                    "pwatermark": rng.random() / 2, "punsafe": rng.random(),
                    "aesthetic": 5 + rng.random(), "similarity": rng.random(),
                }  # fmt: skip
                text = json.dumps(metadata, indent=4).encode()
                for kind, data in (("jpg", b"no image"), ("txt", caption.encode()), ("json", text)):
                    entry = tarfile.TarInfo(f"{key}.{kind}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def first_epoch(folder: Path) -> Batches:
    """The order of batches of shards that are all opened for the first time."""
    source = ShardSource(urls=str(folder))
    stream = Stream(
        opener=ShardPrefetcher(source, keep=0),
        shards=source.groups("train")[0].shards,
        seed=0,
        shuffle_samples=2 * SAMPLES,
        filters=Filters(min_size=512, max_pwatermark=0.5, max_punsafe=0.99, min_aesthetic=5.0),
        holdout=Holdout(0.001),
        stats=DataStats(),
    )
    buckets = Buckets(policy="area", image_size=512, multiple=32)
    return Batches(Mixture([stream], [1.0], seed=0), buckets, batch_size=BATCH, max_upscale=2.0)


def microseconds(folder: Path) -> float:
    """CPU time per sample of listing, filtering, shuffling and bucketing all shards once."""
    batches = first_epoch(folder)
    start = time.process_time()
    while batches.stats.counts["shards"] < SHARDS:
        next(batches)
        batches.snapshot()
    return (time.process_time() - start) / batches.stats.counts["seen"] * 1e6


def run(rounds: int) -> Path:
    """Run the benchmark and write its table; returns the path."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"without indexes": [], "with indexes": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards(folder)
        for _ in range(rounds):
            for path in folder.glob("*.index.json"):
                path.unlink()
            for timings in times.values():
                timings.append(microseconds(folder))
    rows = [
        f"| {label} | {statistics.median(timings):.1f} | {1e6 / statistics.median(timings):,.0f} |"
        for label, timings in times.items()
    ]
    return write_table(
        "order",
        "python scripts/bench.py order",
        f"The order of batches in the main process: {SHARDS * SAMPLES:,} samples in {SHARDS} "
        "shards, with metadata as img2dataset writes it, filters and area buckets. CPU time; "
        f"medians of {rounds} rounds. The first row includes writing the indexes.",
        "| | microseconds per sample | samples per second and core |",
        rows,
    )
