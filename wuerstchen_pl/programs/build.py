"""Write data to shards."""

import os
from collections.abc import Mapping
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from wuerstchen_pl.cli.config import check_config
from wuerstchen_pl.cli.jobs import check_output_dir
from wuerstchen_pl.data.build import build
from wuerstchen_pl.data.datamodule import RUNTIME_KEYS, ImageTextDataModule
from wuerstchen_pl.data.factories import folder
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.plural import plural

KNOWN_KEYS: Mapping[str, Any] = {
    "data": dict,
    "image_size": int,
    "bucket_multiple": int,
    "seed": int,
    "require_caption": bool,
    "from": str | None,
    "to": str,
    "shard_samples": int,
    "num_workers": int,
    "paths.data": str,
}


def run(cfg: DictConfig) -> None:
    """Write shards, and print how to train on them."""
    if cfg["from"] is not None:
        if cfg.data._target_ != f"{folder.__module__}.{folder.__qualname__}":
            raise ValueError(
                f"from={cfg['from']} needs data=folder; remove from, or the other data"
            )
        cfg.data.root = cfg["from"]
    elif OmegaConf.is_missing(cfg.data, "root"):
        raise ValueError("from is missing; set from=... to the folder of images")
    check_config(cfg, KNOWN_KEYS)
    for key, minimum in (("shard_samples", 1), ("num_workers", 0)):
        if cfg[key] < minimum:
            raise ValueError(f"{key}={cfg[key]} is out of range; use {minimum} or more")
    module: ImageTextDataModule = hydra.utils.instantiate(cfg.data, _convert_="all")
    module.prepare_data()
    data_config: Any = OmegaConf.to_container(cfg.data, resolve=True)
    settings = {key: value for key, value in data_config.items() if key not in RUNTIME_KEYS}
    settings["shard_samples"] = cfg.shard_samples
    output_dir = check_output_dir(cfg.to, "to")
    with claimed(output_dir, key="to", settings=settings):
        entries, left_out = build(
            module.source,
            output_dir,
            filters=module.filters,
            settings=settings,
            shard_samples=cfg.shard_samples,
            num_workers=min(cfg.num_workers, os.cpu_count() or 1),
        )
    samples = plural(sum(e["samples"] for e in entries), "sample")
    print(f"{samples} in {plural(len(entries), 'shard')} in {cfg.to}")
    for reason, number in left_out.most_common():
        print(f"  {number:8d} left out: {reason}")
    print(f"train on them with data=shards data.urls={cfg.to}")
