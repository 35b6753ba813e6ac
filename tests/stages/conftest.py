"""Small stages that need no files: B contains A, and C contains B."""

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from wuerstchen_pl.models.compressor import ConvBackbone, SemanticCompressor
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.discriminator import Discriminator
from wuerstchen_pl.models.paella import Paella
from wuerstchen_pl.models.perceptual import RandomFeatures
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.unet import UNet
from wuerstchen_pl.models.vqgan import VQGAN
from wuerstchen_pl.stages.a import StageA
from wuerstchen_pl.stages.b import StageB
from wuerstchen_pl.stages.b_tokens import TokenStageB
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.ldm import StageLDM
from wuerstchen_pl.stages.stage import Batch, Stage

CAPTIONS = ["red apple", "green frog", "black bear", "polar bear"]


def training(lr: float) -> dict:
    """Constructor arguments for training."""
    return {
        # without weight decay, which would change parameters without gradients
        "optimizer": partial(torch.optim.AdamW, lr=lr, weight_decay=0.0, fused=True),
        "ema": EMA(decay=0.9),
    }


def stage_a(**options: object) -> StageA:
    torch.manual_seed(0)
    return StageA(
        vqgan=VQGAN(width=16, bottleneck_blocks=1, codebook_size=16),
        discriminator=Discriminator(width=16, depth=3),
        perceptual=RandomFeatures(widths=[4, 8]),
        **{**training(3e-3), **options},  # type: ignore[arg-type]
    )


def stage_b(**options: object) -> StageB:
    frozen = stage_a()
    torch.manual_seed(0)
    diffnext = DiffNeXt(
        widths=[16, 24], num_blocks=[1, 1], num_heads=[None, 2],
        inject_semantic=[True, True], cond_dim=8, dropout=0.0,
    )  # fmt: skip
    return StageB(
        stage_a=frozen,
        compressor=SemanticCompressor(backbone=ConvBackbone(width=4, depth=3)),
        **{"diffnext": diffnext, **training(3e-3), **options},  # type: ignore[arg-type]
    )


def token_stage_b(**options: object) -> TokenStageB:
    frozen = stage_a()
    torch.manual_seed(0)
    paella = Paella(
        codebook_size=16, token_dim=8, widths=[16, 24], num_blocks=[1, 1], num_heads=[2, 2],
        cond_dim=8, dropout=0.0,
    )  # fmt: skip
    torch.nn.init.normal_(paella.head.weight, std=0.1)  # else all tokens are equally likely
    return TokenStageB(
        compressor=SemanticCompressor(backbone=ConvBackbone(width=4, depth=3)),
        **{"stage_a": frozen, "paella": paella, **training(3e-3), **options},  # type: ignore[arg-type]
    )


def stage_c(**options: object) -> StageC:
    frozen = stage_b()
    torch.manual_seed(0)
    text = TextEncoder(width=16, depth=1, num_heads=2, context_length=8)
    prior = Prior(width=32, depth=2, num_heads=2, text_dim=16, dropout=0.0)
    arguments: Any = {"text_encoder": text, "train_text_encoder": True, **training(3e-3)}
    return StageC(stage_b=frozen, **{"prior": prior, **arguments, **options})


def stage_ldm(**options: object) -> StageLDM:
    frozen = stage_a()
    torch.manual_seed(0)
    text = TextEncoder(width=16, depth=1, num_heads=2, context_length=8)
    unet = UNet(
        widths=[16, 24], num_blocks=[1, 1], num_up_blocks=[1, 2], num_heads=[2, 2],
        cond_dim=8, text_dim=16, dropout=0.0,
    )  # fmt: skip
    arguments: Any = {"text_encoder": text, "train_text_encoder": True, **training(3e-3)}
    return StageLDM(
        stage_a=frozen,  # type: ignore[arg-type]
        prior=unet,  # type: ignore[arg-type]
        **{**arguments, **options},
    )


STAGES = {"a": stage_a, "b": stage_b, "b_tokens": token_stage_b, "c": stage_c, "ldm": stage_ldm}


@pytest.fixture
def batch() -> Batch:
    """Four smooth images of 32 px with their captions."""
    rng = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(
        torch.rand(4, 3, 4, 4, generator=rng), size=(32, 32), mode="bilinear"
    )
    return {"image": images, "caption": list(CAPTIONS), "key": list("abcd")}


def fit(stage: Stage, batch: Batch, steps: int, **options: object) -> L.Trainer:
    """Train for ``steps`` steps on one batch."""
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer.fit(stage, DataLoader([batch] * steps, batch_size=None))
    return trainer
