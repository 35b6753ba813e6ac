"""The cache of a training with ``cache=true``: built before the first step, and used again."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import DictConfig

from wuerstchen_pl.data.caches.build_cache import build_cache
from wuerstchen_pl.data.caches.cached_dataset import MANIFEST, CachedDataModule
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.distributed.launch import DistInfo, resolve_device
from wuerstchen_pl.formats.compatibility import ENCODERS
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.programs.cache import Encoders, cache_settings, check_stage

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)

CROPS, DTYPE, SHARD_MB = 4, "bfloat16", 512


def with_cache(cfg: DictConfig, stage: "Stage", data: ImageTextDataModule) -> CachedDataModule:
    """The data module of the cached outputs of a stage's frozen networks, which are encoded now.

    The cache has a folder of its own under ``paths.data``, named by a hash of the networks, the
    config of the data, and the samples; so a later run with the same ones uses it again. It has 4
    crops of each image, and the text embeddings if they do not change: the text encoder is frozen,
    no new word is trained, and the captions are used as they are.

    Args:
        cfg: the config of ``train``.
        stage: with its frozen networks, which are on the CPU afterwards.
        data: the data module of the images.

    Raises:
        ValueError: if the stage or the data cannot be cached, or torchrun or Slurm started several
            processes, which would build it at the same time.
    """
    check_stage(stage.name, cfg.data)
    if DistInfo.from_env().world_size > 1:
        raise ValueError(
            "cache=true is not supported by torchrun and Slurm; set cache=false, or build the "
            "cache first with python -m wuerstchen_pl.cache, and train with data=cached"
        )
    frozen: Mapping[str, Any] = stage.frozen
    text_encoder = cached_text_encoder(stage, data)
    device = resolve_device(None)
    encoders = Encoders(
        stage=stage.name,
        encoder=frozen[ENCODERS[stage.name]],
        text_encoder=text_encoder,
        dtype=getattr(torch, DTYPE),
        device=device,
    )
    data.prepare_data()
    data.setup()
    settings = cache_settings(
        cfg, data, encoders,
        crops=CROPS, text=text_encoder is not None, dtype=DTYPE, shard_mb=SHARD_MB,
    )  # fmt: skip
    folder = Path(cfg.paths.data, "cached", _digest(settings, data))
    with claimed(folder, key="paths.data", settings=settings):
        if not (folder / MANIFEST).is_file():
            build_cache(data, encoders, folder, settings=settings, crops=CROPS, shard_mb=SHARD_MB)
    stage.frozen.to("cpu")
    logger.info("cache: %s", folder)
    return CachedDataModule(
        root=str(folder),
        batch_size=cfg.data.batch_size,
        val_batch_size=cfg.data.val_batch_size,
        num_workers=0,  # reading takes less time than starting processes
        seed=cfg.data.seed,
        captions=data.captions,
        shuffle_samples=cfg.data.shuffle_samples,
        max_bad_fraction=cfg.data.max_bad_fraction,
    )


def cached_text_encoder(stage: "Stage", data: ImageTextDataModule) -> TextEncoder | None:
    """The text encoder whose embeddings a cache has; None if they change during training."""
    changes = data.captions.changes or stage.words is not None
    return None if changes else cast("TextEncoder | None", stage.frozen.get("text_encoder"))


def _digest(settings: Mapping[str, Any], data: ImageTextDataModule) -> str:
    """A hash of what a cache depends on, with the samples of the first window of each split."""
    samples = {
        split: [(s.key, s.captions, s.width, s.height, s.shard, s.offset, s.size) for s in window]
        for split, window in data.splits.first_window.items()
    }
    text = json.dumps([settings, samples], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
