"""The pipeline that a model on disk, a run or a stage in training is drawn with."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.formats import run
from wuerstchen_pl.pipelines.cascade import CascadePipeline
from wuerstchen_pl.pipelines.ldm import LatentDiffusionPipeline
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline


def load_pipeline(
    model: str, *, prior: str | None = None, device: str, dtype: torch.dtype = torch.float32
) -> CascadePipeline:
    """The pipeline of a model, a run of Stage C, or one of the baseline.

    Raises:
        FileNotFoundError: if there is nothing, or a part is missing.
        ValueError: if it is damaged, or no model.
    """
    if trained_stage(model) == "ldm":
        if prior is not None:
            raise ValueError(f"prior={prior} is of a cascade, and {model} is a baseline; drop it")
        return LatentDiffusionPipeline.from_run(model).to(device, dtype)
    return WuerstchenPipeline.from_pretrained(model, prior=prior, device=device, torch_dtype=dtype)


def trained_stage(model: str) -> str | None:
    """``c``, ``ldm`` or another stage that a run trained; None of a model that is no run.

    Raises:
        FileNotFoundError: if a run has no checkpoint.
        ValueError: if it is damaged.
    """
    path = Path(model)
    if not run.is_run(path):
        return None
    folder = path.parent.parent if path.suffix == ".ckpt" else path
    told: Any = {}
    with suppress(OSError, YAMLError):  # which spares reading all weights for a word
        told = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    if not isinstance(told, dict) or "stage" not in told:
        told = load.read_checkpoint(load.find_checkpoint(model))
    return str(told["stage"]["_target_"]).rpartition(".Stage")[2].lower()


def pipeline_from_stage(stage: Any) -> CascadePipeline:
    """The pipeline of a stage's own networks, as they are now: Stage C's, or the baseline's.

    It freezes them.
    """
    prior = stage.prior_pipeline()
    if not hasattr(stage.decoder, "compressor"):
        return LatentDiffusionPipeline(prior=prior, vqgan=stage.decoder.vqgan)
    return WuerstchenPipeline(
        prior=prior,
        decoder=stage.decoder.decoder_pipeline(),
        compressor=stage.decoder.compressor,
    )
