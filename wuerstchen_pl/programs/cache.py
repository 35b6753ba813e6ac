"""Precompute the frozen networks' outputs for Stage B or C."""

import logging
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from wuerstchen_pl.cli.jobs import check_output_dir
from wuerstchen_pl.data.caches.build_cache import build_cache
from wuerstchen_pl.data.caches.cache_files import MANIFEST, PREPROCESSING
from wuerstchen_pl.data.datamodule import RUNTIME_KEYS, ImageTextDataModule
from wuerstchen_pl.distributed.launch import DistInfo, resolve_device, use_tf32
from wuerstchen_pl.io.images import to_float
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.models.fingerprint import ImageEncoder, encoder_fingerprints
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.plural import plural
from wuerstchen_pl.programs.base_model import use_base_model

logger = logging.getLogger(__name__)

TENSORS = {"b": ["latents", "image"], "c": ["semantic"]}
"""Tensors that are cached for each stage."""


class Encoders:
    """The frozen networks whose outputs are cached.

    Args:
        stage: ``b`` or ``c``.
        encoder: the trained stage that encodes the images.
        text_encoder: frozen; None does not cache text embeddings.
        dtype: type of the cached tensors.
        device: device of the networks.
    """

    def __init__(
        self, *, stage: str, encoder: ImageEncoder, text_encoder: TextEncoder | None,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.stage, self.dtype, self.device = stage, dtype, device
        self.encoder = encoder.to(device)
        self.text_encoder = None if text_encoder is None else text_encoder.eval().to(device)

    @property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of the networks; ``train`` refuses a cache whose hashes differ from its own."""
        return encoder_fingerprints(
            self.stage, encoder=self.encoder, text_encoder=self.text_encoder
        )

    @torch.no_grad()
    def images(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) uint8 -> the tensors of ``TENSORS``, on the CPU."""
        encoded = self.encoder.encode(to_float(images.to(self.device))).to("cpu", self.dtype)
        if self.stage == "c":
            return {"semantic": encoded}
        # a copy, as the batch is in shared memory, which would fill up until a file is written
        return {"latents": encoded, "image": images.clone()}

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor | None:
        """B captions -> (B, L, D) text embeddings, or None without a text encoder."""
        if self.text_encoder is None:
            return None
        return self.text_encoder(captions).to("cpu", self.dtype)


def run(cfg: DictConfig) -> None:
    """Encode the shards that are missing, and write the manifest once all exist."""
    stage: str = hydra.utils.get_class(cfg.stage._target_).name  # type: ignore[attr-defined]
    check_ranges(cfg, stage)
    use_base_model(cfg)
    folder = check_output_dir(cfg.out, "out")
    device = resolve_device(cfg.device)
    use_tf32(device)  # as train does, and the cached tensors are rounded further
    data: ImageTextDataModule = hydra.utils.instantiate(cfg.data, _convert_="all")
    for key, value in data.captions.changes.items() if cfg.text else ():
        raise ValueError(
            f"data.captions.{key}={value!r} cannot change cached text embeddings; remove it, or "
            "set text=false"
        )
    encoders = Encoders(
        stage=stage,
        encoder=hydra.utils.instantiate(cfg.stage["stage_a" if stage == "b" else "stage_b"]),
        text_encoder=hydra.utils.instantiate(cfg.stage.text_encoder) if cfg.text else None,
        dtype=getattr(torch, cfg.dtype),
        device=device,
    )
    data.prepare_data()
    data.setup()
    settings = cache_settings(
        cfg, data, encoders, crops=cfg.crops, text=cfg.text, dtype=cfg.dtype, shard_mb=cfg.shard_mb
    )
    dist_info = DistInfo.from_env()
    with claimed(folder, key="out", settings=settings, is_owner=dist_info.rank == 0):
        missing = build_cache(
            data,
            encoders,
            folder,
            settings=settings,
            crops=cfg.crops,
            shard_mb=cfg.shard_mb,
            rank=dist_info.rank,
            world_size=dist_info.world_size,
        )
    logger.info("%s", data.splits.stats.summary())
    if missing:
        logger.warning(
            "%s missing, such as %s: they are unreadable, or other processes are still "
            "writing them; run the same command again to resume, or with a single process to "
            "finish without them",
            plural(len(missing), "shard"), missing[0],
        )  # fmt: skip
    if (folder / MANIFEST).is_file():
        # A cache contains captions without the changes of training.
        typed = [key for key in HydraConfig.get().overrides.task if "data.captions." in key]
        print(" ".join([f"train with data=cached data.root={cfg.out}", *typed]))


def cache_settings(
    cfg: DictConfig,
    data: ImageTextDataModule,
    encoders: Encoders,
    *,
    crops: int,
    text: bool,
    dtype: str,
    shard_mb: int,
) -> dict[str, Any]:
    """What the contents of a cache depend on, for its manifest.

    Args:
        cfg: with the node ``data``.
        data: the data module of that node, already set up.
        encoders: the frozen networks.
        crops: number of crops of each training image.
        text: whether text embeddings are cached.
        dtype: of the cached tensors.
        shard_mb: approximate size of a file in MB.
    """
    source: Any = OmegaConf.to_container(cfg.data, resolve=True)
    return {
        "made_with": encoders.fingerprint,
        "preprocessing": PREPROCESSING,
        "tensors": TENSORS[encoders.stage],
        "sizes": [list(size) for size in data.sizes],
        "crops": crops,
        "text": text,
        "dtype": dtype,
        "shard_mb": shard_mb,
        "data": {key: value for key, value in source.items() if key not in RUNTIME_KEYS},
    }


def check_ranges(cfg: DictConfig, stage: str) -> None:
    """Refuse a config that cannot be cached.

    Raises:
        ValueError: naming the key.
    """
    check_stage(stage, cfg.data)
    for key in ("crops", "shard_mb"):
        if cfg[key] < 1:
            raise ValueError(f"{key}={cfg[key]} is out of range; use 1 or more")
    if cfg.text and "text_encoder" not in cfg.stage:
        raise ValueError(f"text=true needs a text encoder, and stage={stage} has none; remove it")
    if cfg.text and cfg.stage.get("train_text_encoder", False):
        raise ValueError(
            "text=true caches the output of a frozen text encoder, but "
            "stage.train_text_encoder=true; set text=false"
        )


def check_stage(stage: str, data: DictConfig) -> None:
    """Refuse a stage or data that cannot be cached.

    Args:
        stage: its name.
        data: the node of the config.

    Raises:
        ValueError: naming the key.
    """
    if stage not in TENSORS:
        raise ValueError(f"stage={stage} trains on images, not on a cache; use stage=b or stage=c")
    if "crop" not in data:
        raise ValueError("data=cached is already a cache; choose images, such as data=folder")
    for key in ("mask", "control"):
        if data.get(key):
            raise ValueError(
                f"data.{key}={data[key]!r} needs the images; remove it, or train without a cache "
                "(cache=false)"
            )
