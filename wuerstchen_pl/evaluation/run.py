"""Run an evaluation plan: used by the command and by the training callback."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wuerstchen_pl.distributed.launch import DistInfo
from wuerstchen_pl.evaluation import dataset_metrics, image_metrics, report
from wuerstchen_pl.evaluation.generation import generate_into
from wuerstchen_pl.evaluation.image_folder import ImageFolder
from wuerstchen_pl.evaluation.image_losses import StageWithLoss, image_losses
from wuerstchen_pl.evaluation.inputs import EvaluationInputs
from wuerstchen_pl.evaluation.metrics.distances import check_enough
from wuerstchen_pl.evaluation.metrics.score import Score
from wuerstchen_pl.evaluation.plan import SET_METRICS, EvaluationPlan
from wuerstchen_pl.evaluation.scored_images import ScoredImages
from wuerstchen_pl.models.fingerprint import weights_fingerprint
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.ldm import StageLDM

logger = logging.getLogger(__name__)


IMAGES = "images"
"""Subfolder of the report for generated images."""


@dataclass(kw_only=True)
class EvalTarget:
    """The model and its stages, as far as a plan needs them."""

    metadata: dict[str, Any]
    """Report fields that identify the target."""
    pipeline: TextToImage | None = None
    """None if the plan neither generates images nor runs networks."""
    stages: Mapping[str, StageWithLoss] = field(default_factory=dict)
    """Stages whose losses are measured; see ``stages_with_loss``."""
    feature_cache: dict[str, Tensor] = field(default_factory=dict)
    """Reference features of an earlier evaluation, by the network's sha256."""


def stages_with_loss(stage: StageC | StageLDM) -> dict[str, StageWithLoss]:
    """Stages with a loss: ``b``, if it is present, and ``c`` for Stage C; ``ldm`` for itself.

    The loss of a distilled Stage C needs its teacher, which is present in training only.
    """
    if isinstance(stage, StageLDM):
        return {"ldm": stage}
    with_loss: dict[str, StageWithLoss] = {"b": stage.drawing_stage_b} if stage.can_draw else {}
    if stage.frozen.get("teacher", stage) is None:
        logger.info("validation_loss: Stage C has none, as it was distilled and has no teacher")
        return with_loss
    return {**with_loss, "c": stage}


def check_plan(plan: EvaluationPlan, inputs: EvaluationInputs) -> None:
    """Check before any image is generated that the plan's networks can measure the inputs.

    Raises:
        ValueError: if a network is missing, or there are too few images.
    """
    plan.check_networks()
    for name in {"fid", "kid"} & set(plan.metric):
        assert plan.fid_features is not None
        reference = inputs.reference
        reference_size = [len(reference)] if isinstance(reference, ImageFolder) else []
        check_enough(name, plan.fid_features.width, inputs.num_images, *reference_size)


def evaluate(
    plan: EvaluationPlan,
    inputs: EvaluationInputs,
    target: EvalTarget,
    folder: Path,
    process: DistInfo,
) -> dict[str, Score] | None:
    """Generate images, measure, and write the report.

    Args:
        plan: what to measure; see ``check_plan``.
        inputs: see ``read_inputs``.
        target: what to evaluate.
        folder: for images and report.
        process: all processes generate images; rank 0 measures, and the others return None.

    Raises:
        ValueError: if the plan does not fit the target; images generated so far are kept.
    """
    weights = {}
    if target.pipeline is not None:
        weights = {"weights_sha256": weights_fingerprint(target.pipeline.modules)}
    metadata, images = {**target.metadata, **weights}, inputs.images
    if plan.needs_generation:
        assert target.pipeline is not None
        metadata |= {"settings": asdict(plan.settings), "seed": plan.seed, "prompts": plan.prompts}
        path = folder / IMAGES
        generate_into(path, inputs.requests, target.pipeline, plan.settings, weights, process)
    if process.rank != 0:
        return None
    if plan.needs_generation:
        images = ImageFolder(folder / IMAGES, key="output_dir")
    by_images = {} if images is None else image_scores(images, plan, inputs, target)
    by_networks = network_scores(plan, inputs, target)
    losses: list[ScoredImages] = []
    if "validation_loss" in plan.metric and target.stages:
        assert inputs.data is not None
        means, losses = image_losses(target.stages, inputs.data)
        by_networks |= means
    report.write_report(folder, metadata, by_networks, by_images, images, losses)
    return {**by_images, **by_networks}


def image_scores(
    images: ImageFolder, plan: EvaluationPlan, inputs: EvaluationInputs, target: EvalTarget
) -> dict[str, Score]:
    """The plan's metrics of images."""
    scores: dict[str, Score] = {}
    prompts = images.prompts or ()
    if any(name in SET_METRICS for name in plan.metric):
        assert plan.fid_features is not None
        scores |= image_metrics.set_metrics(
            plan.metric, images, plan.fid_features, inputs.reference, plan.cache_dir,
            target.feature_cache,
        )  # fmt: skip
    if "clip" in plan.metric:
        assert plan.clip is not None
        scores["clip"] = image_metrics.text_metric(images, prompts, plan.clip, "clip")
    if "pickscore" in plan.metric:
        assert plan.pickscore is not None
        pickscores = image_metrics.text_metric(images, prompts, plan.pickscore, "pickscore")
        scores["pickscore"] = pickscores
        scores |= image_metrics.win_rates(prompts, inputs.baselines, pickscores, plan.pickscore)
    if "retrieval" in plan.metric:
        assert target.pipeline is not None
        assert inputs.targets is not None
        scores |= dataset_metrics.retrievals(
            images, inputs.targets.indices, inputs.targets.images, target.pipeline
        )
    return scores


def network_scores(
    plan: EvaluationPlan, inputs: EvaluationInputs, target: EvalTarget
) -> dict[str, Score]:
    """The plan's metrics of the model on its own data."""
    scores: dict[str, Score] = {}
    pipeline, data = target.pipeline, inputs.data
    if pipeline is None or data is None:
        return scores
    if "reconstruction" in plan.metric:
        scores |= dataset_metrics.reconstructions(pipeline, data, plan.settings, plan.lpips)
    if "rfid" in plan.metric:
        assert plan.fid_features is not None
        scores |= dataset_metrics.rfid(pipeline, data, plan.settings, plan.fid_features)
    return scores
