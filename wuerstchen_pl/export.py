"""Export a trained model: ``python -m wuerstchen_pl.export ckpt=outputs/demo/c to=model``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.cli import command
from wuerstchen_pl.config import check_config
from wuerstchen_pl.convert import write
from wuerstchen_pl.formats import model_card
from wuerstchen_pl.formats.registry import FormatName, check_output_empty
from wuerstchen_pl.formats.run import read_run

KNOWN_KEYS: Mapping[str, Any] = {
    "ckpt": str,
    "to": str,
    "format": FormatName,
    "ema": bool,
    "license": str | None,
}


def run(cfg: DictConfig) -> None:
    """Read a checkpoint, and write the model and its model card."""
    check_config(cfg, KNOWN_KEYS)
    check_output_empty(Path(cfg.to))
    path = load.find_checkpoint(cfg.ckpt)
    model = read_run(path, ema=cfg.ema)
    model.card = model_card.render_card(
        model_card.checkpoint_chain(path), license=cfg.license, ema=cfg.ema
    )
    write(model, Path(cfg.to), cfg.format)


main = command("export", run)

if __name__ == "__main__":
    main()
