"""Run an evaluation plan: used by the command and by the training callback."""

import sys
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wuerstchen_pl.distributed.launch import DistInfo
from wuerstchen_pl.evaluation import dataset_metrics, image_metrics, report
from wuerstchen_pl.evaluation.datasets import DatasetImages, data_from_yaml
from wuerstchen_pl.evaluation.generation import GenerationRequest, generate_into
from wuerstchen_pl.evaluation.image_folder import ImageFolder, check_same_number
from wuerstchen_pl.evaluation.metrics.distances import check_enough
from wuerstchen_pl.evaluation.metrics.score import Score
from wuerstchen_pl.evaluation.plan import SET_METRICS, TRAINING_DATA, YAML, EvaluationPlan
from wuerstchen_pl.evaluation.prompt_sets import read_prompts, subsample
from wuerstchen_pl.models.fingerprint import weights_fingerprint
from wuerstchen_pl.pipelines.text_to_image import TextToImage

IMAGES = "images"
"""Subfolder of the report for generated images."""
SIDE = 64
"""Default height and width of an image in pixels."""


@dataclass
class EvalTarget:
    """The model, its data and its stages, as far as a plan needs them."""

    metadata: dict[str, Any]
    """Report fields that identify the target."""
    pipeline: TextToImage | None = None
    """None if the plan neither generates images nor runs networks."""
    stages: dict[str, Any] = field(default_factory=dict)
    """Stages whose validation loss is measured; see ``stages_with_loss``."""
    data: Any = None
    """The data module that the stages were trained on."""
    feature_cache: dict[str, Tensor] = field(default_factory=dict)
    """Reference features of an earlier evaluation, by the network's sha256."""


def stages_with_loss(stage: Any) -> dict[str, Any]:
    """Stages with a validation loss: ``b`` and ``c`` for Stage C, ``ldm`` for the baseline."""
    if stage.name == "ldm":
        return {"ldm": stage}
    return {"b": stage.stage_b, "c": stage}


def evaluate(
    plan: EvaluationPlan, target: EvalTarget, folder: Path, process: DistInfo
) -> dict[str, Score] | None:
    """Generate images, measure, and write the report.

    Args:
        plan: what to measure.
        target: what to evaluate.
        folder: for images and report.
        process: all processes generate images; rank 0 measures, and the others return None.

    Raises:
        ValueError: if the plan does not fit the target; images generated so far are kept.
    """
    images: ImageFolder | None = (
        None if plan.images is None or not plan.needs_images else existing_images(plan)
    )
    requests, retrieval_targets = (
        generation_requests(plan, target.data) if plan.needs_generation else ([], [])
    )
    baselines = [ImageFolder(Path(path), key="baselines") for path in plan.baselines]
    reference = reference_images(plan, target)
    check_plan(plan, len(requests if images is None else images), reference, baselines)
    weights = {}
    if target.pipeline is not None:
        weights = {"weights_sha256": weights_fingerprint(target.pipeline.modules)}
    metadata = {**target.metadata, **weights}
    if plan.needs_generation:
        assert target.pipeline is not None
        metadata |= {"settings": asdict(plan.settings), "seed": plan.seed, "prompts": plan.prompts}
        path = folder / IMAGES
        generate_into(path, requests, target.pipeline, plan.settings, weights, process)
    if process.rank != 0:
        return None
    if plan.needs_generation:
        images = ImageFolder(folder / IMAGES, key="output_dir")
    by_images = (
        {}
        if images is None
        else image_scores(images, plan, target, retrieval_targets, reference, baselines)
    )
    by_networks = network_scores(plan, target)
    report.write_report(folder, metadata, by_networks, by_images, images)
    return {**by_images, **by_networks}


def check_plan(
    plan: EvaluationPlan,
    num_images: int,
    reference: Iterable[Tensor] | None,
    baselines: list[ImageFolder],
) -> None:
    """Check before any image is generated that the plan can be measured.

    Args:
        plan: what to measure.
        num_images: number of images to evaluate.
        reference: images for FID and KID.
        baselines: folders of images for win rates.

    Raises:
        ValueError: if a network is missing, or the numbers of images do not match or are too small.
    """
    plan.check_networks()
    for baseline in baselines:
        check_same_number(num_images, baseline)
    for name in {"fid", "kid"} & set(plan.metric):
        assert plan.fid_features is not None
        reference_size = [len(reference)] if isinstance(reference, ImageFolder) else []
        check_enough(name, plan.fid_features.width, num_images, *reference_size)


def generation_requests(
    plan: EvaluationPlan, data: Any
) -> tuple[list[GenerationRequest], list[int]]:
    """The images to generate, and for training captions the dataset indices of their images."""
    if plan.prompts_are_data:
        source = data if plan.prompts == TRAINING_DATA else data_from_yaml(Path(plan.prompts))
        samples = DatasetImages(source).captioned(plan.num_prompts)
        requests = [
            GenerationRequest(s.caption, plan.seed + s.dataset_index, s.height, s.width)
            for s in samples
        ]
        return requests, [s.dataset_index for s in samples]
    height, width = plan.height or SIDE, plan.width or SIDE
    return [
        GenerationRequest(p, plan.seed + i, height, width) for i, p in enumerate(file_prompts(plan))
    ], []


def num_images(plan: EvaluationPlan) -> int:
    """Number of images that the plan will evaluate; an upper bound for prompts from data."""
    if plan.prompts_are_data:
        return plan.num_prompts or sys.maxsize
    return len(file_prompts(plan))


def file_prompts(plan: EvaluationPlan) -> list[str]:
    """The plan's subset of the prompts in its file."""
    return subsample(read_prompts(plan.prompts), plan.num_prompts, plan.seed)


def existing_images(plan: EvaluationPlan) -> ImageFolder:
    """The folder of images that the plan names; warns if they differ in size."""
    assert plan.images is not None
    prompts = None
    if plan.prompts != TRAINING_DATA:
        prompts = [request.prompt for request in generation_requests(plan, None)[0]]
    images = ImageFolder(Path(plan.images), prompts=prompts)
    if len(sizes := images.sizes()) > 1:
        examples = " and ".join(f"{height} x {width}" for height, width in (sizes[0], sizes[-1]))
        warnings.warn(
            f"{images.key}={images.path} contains images of {len(sizes)} sizes, such as {examples} "
            "px; each is resized by its shorter side and center-cropped",
            stacklevel=2,
        )
    return images


def reference_images(
    plan: EvaluationPlan, target: EvalTarget
) -> ImageFolder | DatasetImages | None:
    """The reference images of ``fid`` and ``kid``; None if neither is measured."""
    if not {"fid", "kid"} & set(plan.metric):
        return None
    if plan.reference == TRAINING_DATA:
        return DatasetImages(target.data)
    if plan.reference.endswith(YAML):
        return DatasetImages(data_from_yaml(Path(plan.reference)))
    return ImageFolder(Path(plan.reference), key="reference")


def image_scores(
    images: ImageFolder,
    plan: EvaluationPlan,
    target: EvalTarget,
    retrieval_targets: list[int],
    reference: ImageFolder | DatasetImages | None,
    baselines: list[ImageFolder],
) -> dict[str, Score]:
    """The plan's metrics of images; ``retrieval_targets`` are dataset indices, one per image."""
    scores: dict[str, Score] = {}
    if any(name in SET_METRICS for name in plan.metric):
        assert plan.fid_features is not None
        scores |= image_metrics.set_metrics(
            plan.metric, images, plan.fid_features, reference, plan.cache_dir, target.feature_cache
        )
    if "clip" in plan.metric:
        assert plan.clip is not None
        scores["clip"] = image_metrics.text_metric(images, plan.clip, "clip")
    if "pickscore" in plan.metric:
        assert plan.pickscore is not None
        scores["pickscore"] = image_metrics.text_metric(images, plan.pickscore, "pickscore")
        scores |= image_metrics.win_rates(images, baselines, scores["pickscore"], plan.pickscore)
    if "retrieval" in plan.metric:
        assert target.pipeline is not None
        scores |= dataset_metrics.retrievals(
            images, retrieval_targets, DatasetImages(target.data), target.pipeline
        )
    return scores


def network_scores(plan: EvaluationPlan, target: EvalTarget) -> dict[str, Score]:
    """The plan's metrics of the model on its own data."""
    scores: dict[str, Score] = {}
    if not plan.needs_networks:
        return scores
    pipeline, data = target.pipeline, target.data
    assert pipeline is not None
    if "reconstruction" in plan.metric:
        scores |= dataset_metrics.reconstructions(pipeline, data, plan.settings, plan.lpips)
    if "rfid" in plan.metric:
        assert plan.fid_features is not None
        scores |= dataset_metrics.rfid(pipeline, data, plan.settings, plan.fid_features)
    if "validation_loss" in plan.metric:
        scores |= dataset_metrics.validation_losses(target.stages, data)
    return scores
