"""Export a trained model."""

from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.formats import model_card
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.programs.convert import write


def run(cfg: DictConfig) -> None:
    """Read a checkpoint, and write the model and its model card."""
    with claimed(Path(cfg.to), key="to", must_be_empty=True):
        path = load.find_checkpoint(cfg.ckpt)
        chain = model_card.checkpoint_chain(path)
        card = model_card.render_card(chain, license=cfg.license, ema=cfg.ema)
        write(replace(read_run(path, ema=cfg.ema), card=card), Path(cfg.to), cfg.format)
