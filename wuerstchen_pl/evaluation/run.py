"""From a plan to scores and their report: the same for the command and within training."""

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wuerstchen_pl.evaluation import own_data, pictures, report
from wuerstchen_pl.evaluation.data import DataPictures, configured
from wuerstchen_pl.evaluation.drawing import Process, Wanted, draw_into
from wuerstchen_pl.evaluation.folder import Folder, check_same_number
from wuerstchen_pl.evaluation.plan import DATA, OF_SETS, Plan
from wuerstchen_pl.evaluation.prompt_sets import read, some
from wuerstchen_pl.fingerprint import of_weights
from wuerstchen_pl.metrics.distances import check_enough
from wuerstchen_pl.metrics.score import Score
from wuerstchen_pl.pipeline.cascade import Cascade

PICTURES = "pictures"
"""The folder, in that of the report, that pictures are drawn into."""
YAML = (".yaml", ".yml")
SIDE = 64
"""Of a picture in pixels, where nothing else is said."""


@dataclass
class Subject:
    """What is evaluated."""

    facts: dict[str, Any]
    """That name it, for the report."""
    pipeline: Cascade | None = None
    """Draws; None if there is nothing to draw."""
    stages: dict[str, Any] = field(default_factory=dict)
    """As of ``denoisers``, for their losses."""
    data: Any = None
    """The data module that they were trained on."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Features of the reference, of an evaluation before."""


def denoisers(stage: Any) -> dict[str, Any]:
    """Those with a validation loss: ``b`` and ``c`` of a Stage C, ``ldm`` of the baseline."""
    if hasattr(stage.decoder, "compressor"):
        return {"b": stage.decoder, "c": stage}
    return {"ldm": stage}


def evaluate(
    plan: Plan, subject: Subject, folder: Path, process: Process
) -> dict[str, Score] | None:
    """Draw, measure, report.

    Args:
        plan: what to measure.
        subject: of what.
        folder: for pictures and report.
        process: of several, which draw together; the first measures, and the others get None.

    Raises:
        ValueError: if something does not fit; the pictures that were drawn are kept.
    """
    judged: Folder | None = None if plan.images is None or not plan.judges else given(plan)
    wanted, own = wanted_by(plan, subject.data) if plan.draws else ([], [])
    others = [Folder(Path(each), key="against") for each in plan.against]
    reference = reference_of(plan, subject)
    check(plan, len(wanted if judged is None else judged), reference, others)
    weights = {}
    if subject.pipeline is not None:
        weights = {"weights_sha256": of_weights(subject.pipeline.modules)}
    facts = {**subject.facts, **weights}
    if plan.draws:
        assert subject.pipeline is not None
        facts |= {"settings": vars(plan.settings), "seed": plan.seed, "prompts": plan.prompts}
        path = folder / PICTURES
        draw_into(path, wanted, subject.pipeline, plan.settings, weights, process)
    if process.rank != 0:
        return None
    if plan.draws:
        judged = Folder(folder / PICTURES, key="output_dir")
    of_drawn = {} if judged is None else scores_of(judged, plan, subject, own, reference, others)
    of_networks = scores_of_networks(plan, subject)
    report.write(folder, facts, of_networks, of_drawn, judged)
    return {**of_drawn, **of_networks}


def check(
    plan: Plan, number: int, reference: Iterable[Tensor] | None, others: list[Folder]
) -> None:
    """Refuse what could not be measured once everything is drawn.

    Args:
        plan: what to measure.
        number: of pictures that there will be.
        reference: to compare with.
        others: to win against.

    Raises:
        ValueError: naming what does not fit.
    """
    for other in others:
        check_same_number(number, other)
    for name in {"fid", "kid"} & set(plan.metric):
        assert plan.features is not None
        known = [len(reference)] if isinstance(reference, Folder) else []
        check_enough(name, plan.features.width, number, *known)


def wanted_by(plan: Plan, data: Any) -> tuple[list[Wanted], list[int]]:
    """The pictures to draw; and of captions of the data, the places of their own pictures."""
    if plan.prompts == DATA or plan.prompts.endswith(YAML):
        named = data if plan.prompts == DATA else configured(Path(plan.prompts))
        chosen = DataPictures(named).captioned(plan.num_prompts)
        wanted = [Wanted(c.caption, plan.seed + c.place, c.height, c.width) for c in chosen]
        return wanted, [c.place for c in chosen]
    height, width = plan.height or SIDE, plan.width or SIDE
    return [Wanted(p, plan.seed + i, height, width) for i, p in enumerate(prompts_of(plan))], []


def number_of(plan: Plan) -> int:
    """How many pictures there will be, as far as the plan knows; of data, at most."""
    if plan.prompts == DATA or plan.prompts.endswith(YAML):
        return plan.num_prompts or sys.maxsize
    return len(prompts_of(plan))


def prompts_of(plan: Plan) -> list[str]:
    """The prompts of a file, as many as the plan wants."""
    return some(read(plan.prompts), plan.num_prompts, plan.seed)


def given(plan: Plan) -> Folder:
    """The pictures that the plan names; a warning if they have several sizes."""
    assert plan.images is not None
    prompts = None
    if plan.prompts != DATA:
        prompts = [each.prompt for each in wanted_by(plan, None)[0]]
    judged = Folder(Path(plan.images), prompts=prompts)
    if len(sizes := judged.sizes()) > 1:
        told = " and ".join(f"{height} x {width}" for height, width in (sizes[0], sizes[-1]))
        warnings.warn(
            f"{judged.key}={judged.path} holds pictures of {len(sizes)} sizes, {told} px among "
            "them; each is resized by its shorter side, and its middle is taken",
            stacklevel=2,
        )
    return judged


def reference_of(plan: Plan, subject: Subject) -> Folder | DataPictures | None:
    """What ``fid`` and ``kid`` compare with."""
    if not {"fid", "kid"} & set(plan.metric):
        return None
    if plan.reference == DATA:
        return DataPictures(subject.data)
    if plan.reference.endswith(YAML):
        return DataPictures(configured(Path(plan.reference)))
    return Folder(Path(plan.reference), key="reference")


def scores_of(
    judged: Folder,
    plan: Plan,
    subject: Subject,
    own: list[int],
    reference: Folder | DataPictures | None,
    others: list[Folder],
) -> dict[str, Score]:
    """Scores of the pictures."""
    found: dict[str, Score] = {}
    if any(name in OF_SETS for name in plan.metric):
        assert plan.features is not None
        found |= pictures.of_sets(
            plan.metric, judged, plan.features, reference, plan.cache_dir, subject.kept
        )
    if "clip" in plan.metric:
        assert plan.clip is not None
        found["clip"] = pictures.of_texts(judged, plan.clip, "clip")
    if "pickscore" in plan.metric:
        assert plan.pickscore is not None
        found["pickscore"] = pictures.of_texts(judged, plan.pickscore, "pickscore")
        found |= pictures.win_rates(judged, others, found["pickscore"], plan.pickscore)
    if "retrieval" in plan.metric:
        assert subject.pipeline is not None
        found |= own_data.retrievals(judged, own, DataPictures(subject.data), subject.pipeline)
    return found


def scores_of_networks(plan: Plan, subject: Subject) -> dict[str, Score]:
    """Scores of the model on its own data."""
    found: dict[str, Score] = {}
    if not plan.of_networks:
        return found
    pipeline, data = subject.pipeline, subject.data
    assert pipeline is not None
    if "reconstruction" in plan.metric:
        found |= own_data.reconstructions(pipeline, data, plan.settings, plan.lpips)
    if "rfid" in plan.metric:
        assert plan.features is not None
        found |= own_data.rfid(pipeline, data, plan.settings, plan.features)
    if "validation_loss" in plan.metric:
        found |= own_data.validation_losses(subject.stages, data)
    return found
