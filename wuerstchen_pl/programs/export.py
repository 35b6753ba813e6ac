"""Export a trained model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.formats import adapter_files, model_card
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.io.atomic import atomic_folder
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.programs.convert import write


def run(cfg: DictConfig) -> None:
    """Read a checkpoint, and write the model and its model card."""
    with claimed(Path(cfg.to), key="to", must_be_empty=True):
        path = load.find_checkpoint(cfg.ckpt)
        if cfg.format == "adapter":
            export_adapter(path, Path(cfg.to), ema=cfg.ema)
            return
        chain = model_card.checkpoint_chain(path)
        card = model_card.render_card(chain, license=cfg.license, ema=cfg.ema)
        write(replace(read_run(path, ema=cfg.ema), card=card), Path(cfg.to), cfg.format)


def export_adapter(checkpoint: Path, folder: Path, *, ema: bool) -> None:
    """Write the adapter of a checkpoint of Stage C as a file that diffusers reads.

    Raises:
        ValueError: if all weights were trained, and not an adapter.
    """
    stage: Any = load_stage(source=checkpoint, stage="c", ema=ema)
    if stage.adapter is None:
        raise ValueError(
            f"format=adapter: {checkpoint} has no adapter, as all its weights were trained; use "
            "another format"
        )
    weights = stage.adapter.weights(stage.prior.state_dict())
    with atomic_folder(folder) as temporary:
        base = stage.prior.source["sha256"]
        adapter_files.write_adapter(temporary / adapter_files.FILE, weights, base_sha256=base)
    print(folder / adapter_files.FILE)
