"""Pipelines of models on disk, of runs, and of stages in training."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from omegaconf import OmegaConf

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.allowed import stage_name
from wuerstchen_pl.formats import run
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.pipelines.ldm import LatentDiffusionPipeline
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline

if TYPE_CHECKING:
    from wuerstchen_pl.stages.c import StageC
    from wuerstchen_pl.stages.ldm import StageLDM


def load_pipeline(
    model: str,
    *,
    prior: str | None = None,
    variant: str | None = None,
    allow_mismatch: bool = False,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> TextToImage:
    """Load the pipeline of a model, of a run of Stage C, or of a run of the baseline.

    Raises:
        FileNotFoundError: if the model or a part of it is missing.
        ValueError: if it is damaged, or not a model, or if ``prior`` or ``variant`` does not apply
            to it.
    """
    if stage_of_run(model) == "ldm":
        for key, value in (("prior", prior), ("variant", variant)):
            if value is not None:
                raise ValueError(
                    f"{key}={value} needs a cascade, but {model} is a baseline; remove {key}"
                )
        stage = cast("StageLDM", load_stage(source=model, stage="ldm"))
        return pipeline_from_stage(stage).to(device, dtype)
    return WuerstchenPipeline.from_pretrained(
        model,
        prior=prior,
        variant=variant,
        allow_mismatch=allow_mismatch,
        device=device,
        torch_dtype=dtype,
    )


def stage_of_run(model: str) -> str | None:
    """The stage that a run trained, such as ``c`` or ``ldm``; None for a model that is not a run.

    Raises:
        FileNotFoundError: if a run has no checkpoint.
        ValueError: if it is damaged.
    """
    path = Path(model)
    if not run.is_run(path):
        return None
    folder = path.parent.parent if path.suffix == ".ckpt" else path
    # read first, as it is much smaller than a checkpoint; YAML can raise almost anything
    with suppress(Exception):
        return stage_name(OmegaConf.load(folder / "config.yaml").stage)
    content = load.read_checkpoint(load.find_checkpoint(model), tensors="none")
    return stage_name(content["stage"])


def pipeline_from_stage(stage: "StageC | StageLDM") -> TextToImage:
    """Build a pipeline that shares a stage's networks, and freeze them."""
    prior, source = stage.prior_sampler(), stage.provenance.source
    image_size = None if source is None else run.image_size(Path(source["path"]))
    if stage.name == "ldm":
        return LatentDiffusionPipeline(
            prior=prior, vqgan=stage.stage_a.vqgan, source=source, image_size=image_size
        )
    return WuerstchenPipeline(
        prior=prior,
        decoder=stage.drawing_stage_b.decoder_sampler(),
        compressor=stage.stage_b.compressor,
        source=source,
        image_size=image_size,
    )
