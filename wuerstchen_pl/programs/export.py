"""Export a trained model."""

from dataclasses import replace
from pathlib import Path
from typing import cast

from huggingface_hub import get_token
from omegaconf import DictConfig
from torch import nn

from wuerstchen_pl.adapters.weights import AdapterWeights
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.allowed import stage_name
from wuerstchen_pl.formats import controlnet_files, model_card
from wuerstchen_pl.formats.adapter_files import FILE, write_adapter
from wuerstchen_pl.formats.hub import upload
from wuerstchen_pl.formats.model import build_network
from wuerstchen_pl.formats.native import CARD
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.formats.stage_parts import STAGE_PARTS
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.formats.word_files import write_words
from wuerstchen_pl.io.atomic import atomic_folder
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.models.prior import Prior
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
            usage=cfg.format if cfg.format in ADDITIONS else "model",
        )
        if cfg.format in ADDITIONS:
            ADDITIONS[cfg.format](path, folder, ema=cfg.ema, card=card)
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
    """Write the adapters of a checkpoint as a file that diffusers reads, and its card.

    Raises:
        ValueError: if all weights were trained, and not an adapter.
    """
    name = stage_name(load.read_checkpoint(checkpoint, tensors="none")["stage"])
    stage = load_stage(source=checkpoint, stage=name, ema=ema)
    if not stage.adapters:
        raise ValueError(
            f"format=adapter: {checkpoint} has no adapter, as all its weights were trained; use "
            "another format"
        )
    networks = nn.ModuleDict()
    weights: AdapterWeights = {}
    sha256: dict[str, str] = {}
    for attribute, adapter in stage.adapters.items():
        part, network = STAGE_PARTS[name][attribute], getattr(stage, attribute)
        networks[part], sha256[part] = network, network.source["sha256"]
        of_network = adapter.weights(network.state_dict())
        weights |= {f"{part}.{layer}": tensors for layer, tensors in of_network.items()}
    with atomic_folder(folder) as temporary:
        write_adapter(temporary / FILE, weights, networks, base_sha256=sha256)
        (temporary / CARD).write_text(card, encoding="utf-8")
    print(folder / FILE)


def export_words(checkpoint: Path, folder: Path, *, ema: bool, card: str) -> None:
    """Write the words that a checkpoint learned, as diffusers and OneTrainer do, and their card.

    Raises:
        ValueError: if it learned none.
    """
    name = stage_name(load.read_checkpoint(checkpoint, tensors="none")["stage"])
    stage = load_stage(source=checkpoint, stage=name, ema=ema)
    if stage.words is None:
        raise ValueError(
            f"format=words: {checkpoint} learned no words, which experiment=token does; use "
            "another format"
        )
    with atomic_folder(folder) as temporary:
        files = write_words(temporary, stage.words, "clip_g" if name == "c" else "clip_h")
        (temporary / CARD).write_text(card, encoding="utf-8")
    print(*(folder / file.name for file in files), sep="\n")


def export_controlnet(checkpoint: Path, folder: Path, *, ema: bool, card: str) -> None:
    """Write the ControlNet of a checkpoint, and its card.

    Raises:
        ValueError: if there is none.
    """
    parts = read_run(checkpoint, ema=ema).parts
    if "controlnet" not in parts:
        raise ValueError(
            f"format=controlnet: {checkpoint} has no ControlNet, which experiment=controlnet "
            "trains; use another format"
        )
    prior = cast(Prior, build_network(parts["prior"]))
    with atomic_folder(folder) as temporary:
        controlnet_files.write_controlnet(
            temporary / controlnet_files.FILE, parts["controlnet"], prior
        )
        (temporary / CARD).write_text(card, encoding="utf-8")
    print(folder / controlnet_files.FILE)


ADDITIONS = {
    "adapter": export_adapter, "words": export_words, "controlnet": export_controlnet,
}  # fmt: skip
"""Formats that have only what a run added to its model."""
