"""Export what a run trained: ``python -m wuerstchen_pl.export ckpt=outputs/demo/c to=model``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from wuerstchen_pl import card, checkpoint
from wuerstchen_pl.cli import command
from wuerstchen_pl.config import check_config
from wuerstchen_pl.convert import write
from wuerstchen_pl.layouts.read import LayoutName, check_free
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
    check_free(Path(cfg.to))
    path = checkpoint.find(cfg.ckpt)
    model = read_run(path, ema=cfg.ema)
    model.card = card.card(card.chain(path), licence=cfg.licence, ema=cfg.ema)
    write(model, Path(cfg.to), cfg.layout)


main = command("export", run)

if __name__ == "__main__":
    main()
