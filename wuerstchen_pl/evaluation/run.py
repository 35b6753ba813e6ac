"""From a plan to scores and their report: the same for the command and within training."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wuerstchen_pl.evaluation import own_data, pictures, report
from wuerstchen_pl.evaluation.data import DataPictures, configured
from wuerstchen_pl.evaluation.drawing import Process, Wanted, draw_into
from wuerstchen_pl.evaluation.folder import Folder
from wuerstchen_pl.evaluation.plan import DATA, OF_SETS, Plan
from wuerstchen_pl.evaluation.prompt_sets import read, some
from wuerstchen_pl.metrics.score import Score
from wuerstchen_pl.pipeline.cascade import Cascade

PICTURES = "pictures"
"""The folder, in that of the report, that pictures are drawn into."""
YAML = (".yaml", ".yml")
SIDE = 64
"""Of a picture in pixels, where nothing else is said."""


class Subject:
    """What is evaluated.

    Args:
        facts: that name it; they go into the report.
        pipeline: draws; None if there is nothing to draw.
        stages: as of ``denoisers``, for their losses.
        data: the data module that they were trained on.
    """

    def __init__(
        self,
        *,
        facts: dict[str, Any],
        pipeline: Cascade | None = None,
        stages: Mapping[str, Any] | None = None,
        data: Any = None,
    ) -> None:
        self.facts, self.pipeline, self.data = facts, pipeline, data
        self.stages = dict(stages or {})

    @property
    def drawn_by(self) -> dict[str, Any]:
        """The facts that pictures depend on: weights, wherever they lie."""
        by_hash = "weights_sha256" in self.facts
        return {k: v for k, v in self.facts.items() if not (by_hash and k == "model")}


def denoisers(name: str, stage: Any) -> dict[str, Any]:
    """Those with a validation loss: ``b`` and ``c`` of a Stage C, ``ldm`` of the baseline."""
    return {"b": stage.decoder, "c": stage} if name == "c" else {name: stage}


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
    judged: Folder | None = None
    own: list[int] = []
    if plan.draws:
        wanted, own = wanted_by(plan, subject.data)
        assert subject.pipeline is not None
        path = folder / PICTURES
        draw_into(path, wanted, subject.pipeline, plan.settings, subject.drawn_by, process)
    if process.rank != 0:
        return None
    if plan.draws:
        judged = Folder(folder / PICTURES, key="output_dir")
    elif plan.judges:
        judged = given(plan)
    of_drawn = {} if judged is None else scores_of(judged, plan, subject, own)
    of_networks = scores_of_networks(plan, subject)
    facts = {**subject.facts, "settings": vars(plan.settings), "seed": plan.seed}
    facts |= {"prompts": plan.prompts, "reference": plan.reference}
    report.write(folder, facts, of_networks, of_drawn, judged)
    return {**of_networks, **of_drawn}


def wanted_by(plan: Plan, data: Any) -> tuple[list[Wanted], list[int]]:
    """The pictures to draw; and of captions of the data, the places of their own pictures."""
    if plan.prompts == DATA or plan.prompts.endswith(YAML):
        named = data if plan.prompts == DATA else configured(Path(plan.prompts))
        chosen = DataPictures(named).captioned(plan.num_prompts)
        wanted = [Wanted(c.caption, plan.seed + c.place, c.height, c.width) for c in chosen]
        return wanted, [c.place for c in chosen]
    prompts = some(read(plan.prompts), plan.num_prompts, plan.seed)
    height, width = plan.height or SIDE, plan.width or SIDE
    return [Wanted(p, plan.seed + i, height, width) for i, p in enumerate(prompts)], []


def scores_of(judged: Folder, plan: Plan, subject: Subject, own: list[int]) -> dict[str, Score]:
    """Scores of the pictures."""
    found: dict[str, Score] = {}
    others = [Folder(Path(each), key="against") for each in plan.against]
    if any(name in OF_SETS for name in plan.metric):
        assert plan.features is not None
        found |= pictures.of_sets(
            plan.metric, judged, plan.features, reference_of(plan, subject), plan.cache_dir
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


def given(plan: Plan) -> Folder:
    """The pictures that the plan names; a warning if they have several sizes."""
    assert plan.images is not None
    prompts = None if plan.prompts == DATA else read(plan.prompts)
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
