"""Export a trained model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from omegaconf import DictConfig

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.allowed import stage_class
from wuerstchen_pl.formats import adapter_files, model_card
from wuerstchen_pl.formats.hub import upload
from wuerstchen_pl.formats.native import CARD
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.io.atomic import atomic_folder
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.plural import plural
from wuerstchen_pl.programs.convert import write


def run(cfg: DictConfig) -> None:
    """Read a checkpoint, write the model and its model card, and upload them if asked to."""
    folder = Path(cfg.to)
    with claimed(folder, key="to", must_be_empty=True):
        path = load.find_checkpoint(cfg.ckpt)
        card = model_card.render_card(
            model_card.checkpoint_chain(path),
            license=cfg.license,
            ema=cfg.ema,
            usage="adapter" if cfg.format == "adapter" else "model",
        )
        if cfg.format == "adapter":
            export_adapter(path, folder, ema=cfg.ema, card=card)
        else:
            write(replace(read_run(path, ema=cfg.ema), card=card), folder, cfg.format)
    if cfg.push is not None:
        push(folder, cfg.push)


def push(folder: Path, repo_id: str) -> None:
    """Upload a folder to the hub; without a token, say what would be uploaded."""
    if get_token() is not None:
        print(upload(folder, repo_id))
        return
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        print(f"{path.stat().st_size / 1e6:12.3f} MB  {path.relative_to(folder)}")
    print(
        f"push={repo_id} would upload {plural(len(files), 'file')}; log in with hf auth login, or "
        "set HF_TOKEN, and run hf upload, or the same command with another to="
    )


def export_adapter(checkpoint: Path, folder: Path, *, ema: bool, card: str) -> None:
    """Write the adapter of a checkpoint of Stage C as a file that diffusers reads, and its card.

    Raises:
        ValueError: if all weights were trained, and not an adapter.
    """
    name = stage_class(load.read_checkpoint(checkpoint, tensors="none")["stage"]).name
    if name != "c":
        raise ValueError(
            f"format=adapter is for Stage C, and {checkpoint} is of stage={name}; use "
            "format=native, which has the adapter merged"
        )
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
        (temporary / CARD).write_text(card, encoding="utf-8")
    print(folder / adapter_files.FILE)
