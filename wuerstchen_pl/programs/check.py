"""Inspect data."""

from collections.abc import Mapping
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from wuerstchen_pl import train
from wuerstchen_pl.cli.config import check_config
from wuerstchen_pl.cli.jobs import check_output_dir, typed_keys
from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.histogram import plot_histograms
from wuerstchen_pl.data.inspect import format_report, inspect_data
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.programs.base_model import use_base_model

UNREAD = {"stage", "trainer", "callbacks", "logger"}
KNOWN_KEYS: Mapping[str, Any] = {
    **{key: hint for key, hint in train.KNOWN_KEYS.items() if key.split(".")[0] not in UNREAD},
    "full": bool,
    "output_dir": str,
}


def run(cfg: DictConfig) -> float:
    """Inspect all data, print a report and save a plot; return the number of usable images."""
    if not {"data", "experiment"} & set(typed_keys()):
        raise ValueError("data is not set; use data=folder data.root=..., or another data=")
    # the rest of a training's config may be incomplete, such as the path of a text encoder
    check_config(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in UNREAD]), KNOWN_KEYS
    )
    use_base_model(cfg)
    output_dir = check_output_dir(cfg.output_dir)
    # pixels per semantic position, if the stage has them
    choices: Any = HydraConfig.get().runtime.choices
    pixels = cfg.image_size_at_24 / 24 if choices.stage in ("b", "c") else None
    module: ImageTextDataModule = hydra.utils.instantiate(cfg.data, _convert_="all")
    module.prepare_data()
    inspection = inspect_data(module, full=cfg.full)
    print(format_report(inspection, pixels))
    if module.source.groups("val"):
        print("for validation:")
        print(format_report(inspect_data(module, "val", full=cfg.full), pixels))
    if inspection.sizes:
        with claimed(output_dir, key="output_dir"):
            plot_histograms(inspection.sizes, module.sizes).savefig(output_dir / "sizes.png")
        print(output_dir / "sizes.png")
    if not inspection.left:
        raise ValueError("nothing is left to train on; see the bad and dropped samples above")
    return float(inspection.left)
