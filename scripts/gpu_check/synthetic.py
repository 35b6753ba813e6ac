"""Stages B and C at a size, with random weights and batches in which all that is frozen is cached.

Their training steps are the package's, without data loading and frozen text encoders.
"""

from functools import cache
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from scripts.gpu_check.sizes import Size
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.cli.config import conf_dir
from wuerstchen_pl.models.discriminator import Discriminator
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.stages.a import StageA
from wuerstchen_pl.stages.b import StageB
from wuerstchen_pl.stages.c import StageC

TOKENS = 77


def compose(stage: str, size: Size, *overrides: str) -> DictConfig:
    """The configuration of ``train`` for a stage; the EMA is updated in every step."""
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        return hydra.compose(
            "train",
            [
                f"stage={stage}", f"preset={size.preset}", f"image_size={size.image_size}",
                "paths.output_dir=.", "paths.stage_a=.", "paths.stage_b=.",
                "stage.ema.start_step=0", "stage.ema.every_steps=1",
                "trainer.max_steps=1000", "validate_every_steps=1000", *overrides,
            ],
        )  # fmt: skip


@cache
def config_of(stage: str, size: Size) -> dict[str, Any]:
    """The resolved configuration of a stage, without pretrained weights."""
    cfg: Any = OmegaConf.to_container(compose(stage, size).stage, resolve=True)
    if stage == "b" and "weights" in cfg["compressor"]["backbone"]:
        cfg["compressor"]["backbone"]["weights"] = None
    return cfg


def build_network(stage: str, part: str, size: Size) -> Any:
    """A network of a stage, with random weights, on torch's default device."""
    return hydra.utils.instantiate(config_of(stage, size)[part], _convert_="all")


def build_text_encoder(width: int) -> TextEncoder:
    """A text encoder that is never run, because the token states are cached."""
    encoder = TextEncoder(width=width, depth=1, num_heads=1, vocab_size=1)
    encoder.weights = "none"  # the stages refuse a frozen encoder with random weights
    return encoder


def build_stage_b(size: Size) -> StageB:
    """Stage B with its compressor and a frozen Stage A, on torch's default device."""
    diffnext = build_network("b", "diffnext", size)
    text_dim = diffnext.text_dim
    networks = {
        "diffnext": diffnext,
        "compressor": build_network("b", "compressor", size),
        "text_encoder": None if text_dim is None else build_text_encoder(text_dim),
        "stage_a": StageA(
            vqgan=build_network("a", "vqgan", size), discriminator=Discriminator(width=16, depth=3)
        ),
    }
    return with_networks("b", size, networks)


def build_stage_c(size: Size) -> StageC:
    """Stage C, on torch's default device; its frozen Stage B is a tiny one."""
    prior = build_network("c", "prior", size)
    networks = {
        "prior": prior,
        "text_encoder": build_text_encoder(prior.text_dim),
        "stage_b": build_stage_b(size._replace(preset="tiny")),
        "train_text_encoder": False,
    }
    return with_networks("c", size, networks)


def with_networks(stage: str, size: Size, networks: dict[str, Any]) -> Any:
    """A stage with these networks, and the optimizer and further settings of its configuration."""
    settings = {k: v for k, v in config_of(stage, size).items() if k not in networks}
    return hydra.utils.instantiate({**settings, "_partial_": True}, _convert_="all")(**networks)


def random_batch(stage: StageB | StageC, size: Size, rows: int) -> Batch:
    """A batch for a stage, on torch's default device."""
    names = [str(i) for i in range(rows)]
    batch: Batch = {"caption": names, "key": names}
    if stage.name == "b":
        batch["image"] = torch.rand(rows, 3, size.image_size, size.image_size)
        text_dim = stage.diffnext.text_dim
    else:
        batch["semantic"] = torch.randn(rows, 16, size.grid, size.grid)
        text_dim = stage.prior.text_dim
    if text_dim is not None:
        batch["text"] = torch.randn(rows, TOKENS, text_dim)
        batch["empty_text"] = torch.randn(1, TOKENS, text_dim)
    return batch
