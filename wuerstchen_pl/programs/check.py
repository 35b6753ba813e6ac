"""Inspect data."""

import hydra
from omegaconf import DictConfig

from wuerstchen_pl.data.datamodule import ImageTextDataModule
from wuerstchen_pl.data.histogram import plot_histograms
from wuerstchen_pl.data.inspect import format_report, inspect_data
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.jobs import check_output_dir


def run(cfg: DictConfig) -> float:
    """Inspect all data, print a report and save a plot; return the number of usable images."""
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
