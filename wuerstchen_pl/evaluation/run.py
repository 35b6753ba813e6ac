"""From a plan to scores and their report: the same for the command and within training."""

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
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
from wuerstchen_pl.evaluation.plan import SET_METRICS, TRAINING_DATA, EvaluationPlan
from wuerstchen_pl.evaluation.prompt_sets import read_prompts, subsample
from wuerstchen_pl.models.fingerprint import weights_fingerprint
from wuerstchen_pl.pipelines.cascade import CascadePipeline

IMAGES = "images"
"""The folder, in that of the report, that images are drawn into."""
YAML = (".yaml", ".yml")
SIDE = 64
"""Of an image in pixels, where nothing else is said."""


@dataclass
class EvalTarget:
    """What is evaluated."""

    facts: dict[str, Any]
    """That name it, for the report."""
    pipeline: CascadePipeline | None = None
    """None if no image has to be generated."""
    stages: dict[str, Any] = field(default_factory=dict)
    """See ``denoisers``, for their losses."""
    data: Any = None
    """The data module that they were trained on."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Features of the reference, of an evaluation before."""


def stages_with_loss(stage: Any) -> dict[str, Any]:
    """Those with a validation loss: ``b`` and ``c`` of a Stage C, ``ldm`` of the baseline."""
    if stage.name == "ldm":
        return {"ldm": stage}
    return {"b": stage.stage_b, "c": stage}


def evaluate(
    plan: EvaluationPlan, subject: EvalTarget, folder: Path, process: DistInfo
) -> dict[str, Score] | None:
    """Draw, measure, report.

    Args:
        plan: what to measure.
        subject: of what.
        folder: for images and report.
        process: of several, which draw together; the first measures, and the others get None.

    Raises:
        ValueError: if something does not fit; the images that were drawn are kept.
    """
    judged: ImageFolder | None = (
        None if plan.images is None or not plan.judges else given_images(plan)
    )
    wanted, own = generation_requests(plan, subject.data) if plan.draws else ([], [])
    others = [ImageFolder(Path(each), key="baselines") for each in plan.baselines]
    reference = reference_images(plan, subject)
    check_plan(plan, len(wanted if judged is None else judged), reference, others)
    weights = {}
    if subject.pipeline is not None:
        weights = {"weights_sha256": weights_fingerprint(subject.pipeline.modules)}
    facts = {**subject.facts, **weights}
    if plan.draws:
        assert subject.pipeline is not None
        facts |= {"settings": vars(plan.settings), "seed": plan.seed, "prompts": plan.prompts}
        path = folder / IMAGES
        generate_into(path, wanted, subject.pipeline, plan.settings, weights, process)
    if process.rank != 0:
        return None
    if plan.draws:
        judged = ImageFolder(folder / IMAGES, key="output_dir")
    of_drawn = {} if judged is None else image_scores(judged, plan, subject, own, reference, others)
    of_networks = network_scores(plan, subject)
    report.write_report(folder, facts, of_networks, of_drawn, judged)
    return {**of_drawn, **of_networks}


def check_plan(
    plan: EvaluationPlan, number: int, reference: Iterable[Tensor] | None, others: list[ImageFolder]
) -> None:
    """Refuse what could not be measured once everything is drawn.

    Args:
        plan: what to measure.
        number: of images that there will be.
        reference: to compare with.
        others: to win against.

    Raises:
        ValueError: naming what does not fit.
    """
    for other in others:
        check_same_number(number, other)
    for name in {"fid", "kid"} & set(plan.metric):
        assert plan.fid_features is not None
        known = [len(reference)] if isinstance(reference, ImageFolder) else []
        check_enough(name, plan.fid_features.width, number, *known)


def generation_requests(
    plan: EvaluationPlan, data: Any
) -> tuple[list[GenerationRequest], list[int]]:
    """The images to draw; and of captions of the data, the places of their own images."""
    if plan.prompts == TRAINING_DATA or plan.prompts.endswith(YAML):
        named = data if plan.prompts == TRAINING_DATA else data_from_yaml(Path(plan.prompts))
        chosen = DatasetImages(named).captioned(plan.num_prompts)
        wanted = [
            GenerationRequest(c.caption, plan.seed + c.place, c.height, c.width) for c in chosen
        ]
        return wanted, [c.place for c in chosen]
    height, width = plan.height or SIDE, plan.width or SIDE
    return [
        GenerationRequest(p, plan.seed + i, height, width) for i, p in enumerate(file_prompts(plan))
    ], []


def num_images(plan: EvaluationPlan) -> int:
    """How many images there will be, as far as the plan knows; of data, at most."""
    if plan.prompts == TRAINING_DATA or plan.prompts.endswith(YAML):
        return plan.num_prompts or sys.maxsize
    return len(file_prompts(plan))


def file_prompts(plan: EvaluationPlan) -> list[str]:
    """The prompts of a file, as many as the plan wants."""
    return subsample(read_prompts(plan.prompts), plan.num_prompts, plan.seed)


def given_images(plan: EvaluationPlan) -> ImageFolder:
    """The images that the plan names; a warning if they have several sizes."""
    assert plan.images is not None
    prompts = None
    if plan.prompts != TRAINING_DATA:
        prompts = [each.prompt for each in generation_requests(plan, None)[0]]
    judged = ImageFolder(Path(plan.images), prompts=prompts)
    if len(sizes := judged.sizes()) > 1:
        examples = " and ".join(f"{height} x {width}" for height, width in (sizes[0], sizes[-1]))
        warnings.warn(
            f"{judged.key}={judged.path} holds images of {len(sizes)} sizes, {examples} px among "
            "them; each is resized by its shorter side, and its middle is taken",
            stacklevel=2,
        )
    return judged


def reference_images(
    plan: EvaluationPlan, subject: EvalTarget
) -> ImageFolder | DatasetImages | None:
    """What ``fid`` and ``kid`` compare with."""
    if not {"fid", "kid"} & set(plan.metric):
        return None
    if plan.reference == TRAINING_DATA:
        return DatasetImages(subject.data)
    if plan.reference.endswith(YAML):
        return DatasetImages(data_from_yaml(Path(plan.reference)))
    return ImageFolder(Path(plan.reference), key="reference")


def image_scores(
    judged: ImageFolder,
    plan: EvaluationPlan,
    subject: EvalTarget,
    own: list[int],
    reference: ImageFolder | DatasetImages | None,
    others: list[ImageFolder],
) -> dict[str, Score]:
    """Scores of the images."""
    found: dict[str, Score] = {}
    if any(name in SET_METRICS for name in plan.metric):
        assert plan.fid_features is not None
        found |= image_metrics.set_metrics(
            plan.metric, judged, plan.fid_features, reference, plan.cache_dir, subject.kept
        )
    if "clip" in plan.metric:
        assert plan.clip is not None
        found["clip"] = image_metrics.text_metric(judged, plan.clip, "clip")
    if "pickscore" in plan.metric:
        assert plan.pickscore is not None
        found["pickscore"] = image_metrics.text_metric(judged, plan.pickscore, "pickscore")
        found |= image_metrics.win_rates(judged, others, found["pickscore"], plan.pickscore)
    if "retrieval" in plan.metric:
        assert subject.pipeline is not None
        found |= dataset_metrics.retrievals(
            judged, own, DatasetImages(subject.data), subject.pipeline
        )
    return found


def network_scores(plan: EvaluationPlan, subject: EvalTarget) -> dict[str, Score]:
    """Scores of the model on its own data."""
    found: dict[str, Score] = {}
    if not plan.of_networks:
        return found
    pipeline, data = subject.pipeline, subject.data
    assert pipeline is not None
    if "reconstruction" in plan.metric:
        found |= dataset_metrics.reconstructions(pipeline, data, plan.settings, plan.lpips)
    if "rfid" in plan.metric:
        assert plan.fid_features is not None
        found |= dataset_metrics.rfid(pipeline, data, plan.settings, plan.fid_features)
    if "validation_loss" in plan.metric:
        found |= dataset_metrics.validation_losses(subject.stages, data)
    return found
