"""Inspect data, or write them to shards: ``python -m wuerstchen_pl.data check|build``.

python -m wuerstchen_pl.data check data=folder data.root=my/images full=true
python -m wuerstchen_pl.data build from=my/images to=my/shards
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from wuerstchen_pl.cli import check_output_dir, command
from wuerstchen_pl.config import check_config
from wuerstchen_pl.data.build import build
from wuerstchen_pl.data.datamodule import RUNTIME_KEYS, ImageTextDataModule
from wuerstchen_pl.data.factories import folder
from wuerstchen_pl.data.histogram import plot_histograms
from wuerstchen_pl.data.inspect import format_report, inspect_data
from wuerstchen_pl.io.output_folder import claimed

SHARED_KEYS: Mapping[str, Any] = {
    "data": dict,
    "image_size": int,
    "bucket_multiple": int,
    "seed": int,
    "paths.data": str,
}
CHECK_KEYS = {**SHARED_KEYS, "full": bool, "output_dir": str}
BUILD_KEYS = {
    **SHARED_KEYS,
    "from": str | None,
    "to": str,
    "shard_samples": int,
    "num_workers": int,
}


def run_check(cfg: DictConfig) -> float:
    """Inspect all data, print a report and save a plot; return the number of usable images."""
    check_config(cfg, CHECK_KEYS)
    output_dir = check_output_dir(cfg.output_dir)
    module: ImageTextDataModule = hydra.utils.instantiate(cfg.data, _convert_="all")
    module.prepare_data()
    inspection = inspect_data(module, full=cfg.full)
    print(format_report(inspection))
    if module.source.groups("val"):
        print("for validation:")
        print(format_report(inspect_data(module, "val", full=cfg.full)))
    if inspection.sizes:
        with claimed(output_dir, key="output_dir"):
            plot_histograms(inspection.sizes, module.sizes).savefig(output_dir / "sizes.png")
        print(output_dir / "sizes.png")
    if not inspection.left:
        raise ValueError("nothing is left to train on; see the bad and dropped samples above")
    return float(inspection.left)


def run_build(cfg: DictConfig) -> None:
    """Write shards, and print how to train on them."""
    if cfg["from"] is not None:
        if cfg.data._target_ != f"{folder.__module__}.{folder.__qualname__}":
            raise ValueError(
                f"from={cfg['from']} needs data=folder; remove from, or the other data"
            )
        cfg.data.root = cfg["from"]
    elif OmegaConf.is_missing(cfg.data, "root"):
        raise ValueError("from is missing; set from=... to the folder of images")
    check_config(cfg, BUILD_KEYS)
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
    print(f"{sum(e['samples'] for e in entries)} samples in {len(entries)} shards in {cfg.to}")
    for reason, number in left_out.most_common():
        print(f"  {number:8d} left out: {reason}")
    print(f"train on them with data=shards data.urls={cfg.to}")


COMMANDS = {"check": command("check", run_check), "build": command("build", run_build)}


def main() -> None:
    """Run the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        name = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        sys.exit(f"data: {name} is not a command; use check or build, then key=value ...")
    COMMANDS[sys.argv.pop(1)]()


if __name__ == "__main__":
    main()
