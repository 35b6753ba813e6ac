"""Export what a run trained: ``python -m wuerstchen_pl.export ckpt=outputs/demo/c to=model``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from wuerstchen_pl import card, checkpoint
from wuerstchen_pl.cli import command
from wuerstchen_pl.config import check_config
from wuerstchen_pl.convert import write
from wuerstchen_pl.layouts.read import LayoutName
from wuerstchen_pl.layouts.run import read_run

READ: Mapping[str, Any] = {
    "ckpt": str,
    "to": str,
    "layout": LayoutName,
    "ema": bool,
    "licence": str | None,
}


def run(cfg: DictConfig) -> None:
    """Check, read, write the model and its card."""
    check_config(cfg, READ)
    path = checkpoint.find(cfg.ckpt)
    told = card.card(card.chain(path), licence=cfg.licence, ema=cfg.ema)
    write(read_run(path, ema=cfg.ema), Path(cfg.to), cfg.layout, readme=told)


main = command("export", run)

if __name__ == "__main__":
    main()
