"""Small random Wuerstchen models of diffusers and transformers, as references for comparison.

The default initialization would hide differences: diffusers' decoder starts with residual weights
near 0, norms, Stage A's gates and the time projections start at 0, and Stage C's output may divide
by almost 0. So every parameter is randomized, and output layers are kept small.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    WuerstchenCombinedPipeline,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenPrior
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scripts.randomize import randomize
from wuerstchen_pl.models.tokenizer import write_vocabulary

VERSION = diffusers.__version__
Config = dict[str, Any]
PRIOR: Config = {"c_in": 16, "c": 32, "c_cond": 24, "c_r": 16, "depth": 2, "nhead": 4}
DECODER: Config = {
    "c_in": 4, "c_out": 4, "c_r": 16, "c_cond": 16, "c_hidden": [16, 24, 32], "nhead": [-1, 2, 4],
    "blocks": [1, 2, 1], "level_config": ["CT", "CTA", "CTA"],
    "inject_effnet": [False, True, True], "clip_embd": 20, "effnet_embd": 16,
}  # fmt: skip
PUBLISHED_DECODER: Config = {"clip_embd": 1024}
VQGAN: Config = {"bottleneck_blocks": 2, "embed_dim": 16, "num_vq_embeddings": 32}


def text_encoder(width: int, seed: int) -> CLIPTextModel:
    """A small random CLIP text model."""
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=width * 3, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=49408, hidden_act="gelu", bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    return randomize(CLIPTextModel(config), seed)


class Networks(NamedTuple):
    """The networks of a WuerstchenCombinedPipeline, by its names, without text encoders."""

    prior_prior: Any
    decoder: Any
    vqgan: Any


def networks(prior: Config, decoder: Config, vqgan: Config) -> Networks:
    """Random networks, on torch's default device."""
    nets = Networks(
        randomize(WuerstchenPrior(**prior), 1),
        randomize(WuerstchenDiffNeXt(**decoder), 3),
        randomize(PaellaVQModel(**vqgan), 4),
    )
    with torch.no_grad():  # noise of about unit variance, images rarely clamped
        for layer in (nets.prior_prior.out[1], nets.decoder.clf[1], nets.vqgan.out_block[0]):
            layer.weight.mul_(0.2)
            layer.bias.mul_(0.2)
        bias = nets.decoder.clf[1].bias
        bias[bias.numel() // 2 :].add_(3)
        nets.vqgan.out_block[0].bias.add_(0.5)
    return nets


def combined(
    folder: Path, prior: Config = PRIOR, decoder: Config = DECODER, vqgan: Config = VQGAN
) -> Any:
    """A random WuerstchenCombinedPipeline; the tokenizer's files are written to ``folder``."""
    write_vocabulary(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    nets = networks(prior, decoder, vqgan)
    pipe: Any = WuerstchenCombinedPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(decoder["clip_embd"], 2),
        decoder=nets.decoder,
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=nets.vqgan,
        prior_tokenizer=tokenizer,
        prior_text_encoder=text_encoder(prior["c_cond"], 5),
        prior_prior=nets.prior_prior,
        prior_scheduler=DDPMWuerstchenScheduler(),
    )
    for part in (pipe, pipe.prior_pipe, pipe.decoder_pipe):
        part.set_progress_bar_config(disable=True)
    return pipe


def save_pair(pipe: Any, folder: Path) -> tuple[Path, Path]:
    """Save in the published layout: a decoder folder and a prior folder."""
    decoder, prior = folder / "wuerstchen", folder / "wuerstchen-prior"
    _save(
        pipe.decoder_pipe, decoder, ("text_encoder", "tokenizer", "decoder", "vqgan", "scheduler")
    )
    _save(pipe.prior_pipe, prior, ("text_encoder", "tokenizer", "prior", "scheduler"))
    return decoder, prior


def _save(pipe: Any, folder: Path, parts: tuple[str, ...]) -> None:
    index: dict[str, Any] = {"_class_name": type(pipe).__name__}
    for part in parts:
        getattr(pipe, part).save_pretrained(folder / part)
        index[part] = ["diffusers", type(getattr(pipe, part)).__name__]
    for key in ("latent_mean", "latent_std", "resolution_multiple", "latent_dim_scale"):
        if key in pipe.config:
            index[key] = pipe.config[key]
    (folder / "model_index.json").write_text(json.dumps(index))
