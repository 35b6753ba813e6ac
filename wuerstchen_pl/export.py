"""Export a trained model: ``python -m wuerstchen_pl.export ckpt=outputs/demo/c to=model``."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.cli import command
from wuerstchen_pl.config import check_config
from wuerstchen_pl.convert import write
from wuerstchen_pl.formats import model_card
from wuerstchen_pl.formats.registry import FormatName
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.io.output_folder import claimed

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
    with claimed(Path(cfg.to), key="to", must_be_empty=True):
        path = load.find_checkpoint(cfg.ckpt)
        chain = model_card.checkpoint_chain(path)
        card = model_card.render_card(chain, license=cfg.license, ema=cfg.ema)
        write(replace(read_run(path, ema=cfg.ema), card=card), Path(cfg.to), cfg.format)


main = command("export", run)

if __name__ == "__main__":
    main()
