"""Evaluate a model, or images."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig

from wuerstchen_pl.cli.jobs import check_output_dir, typed_keys
from wuerstchen_pl.distributed.launch import DistInfo, resolve_device
from wuerstchen_pl.evaluation import report
from wuerstchen_pl.evaluation.datasets import run_data
from wuerstchen_pl.evaluation.image_losses import StageWithLoss
from wuerstchen_pl.evaluation.inputs import read_inputs
from wuerstchen_pl.evaluation.metrics.score import Score
from wuerstchen_pl.evaluation.plan import NETWORK_METRICS, NETWORKS, EvaluationPlan
from wuerstchen_pl.evaluation.run import EvalTarget, check_plan, evaluate, stages_with_loss
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.models.perceptual import LPIPS
from wuerstchen_pl.pipelines.loading import load_pipeline, pipeline_from_stage, stage_of_run
from wuerstchen_pl.pipelines.text_to_image import TextToImage
from wuerstchen_pl.sampling.device import dtype_name, log_dtype, sampling_dtype
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.ldm import StageLDM


def run(cfg: DictConfig) -> float | None:
    """Generate images, compute and write the metrics; returns the first, for sweeps."""
    plan = build_plan(cfg)
    check_typed_keys(plan)
    folder, process = check_output_dir(cfg.output_dir), DistInfo.from_env()
    device = resolve_device(cfg.device)
    trained = check_model(cfg, plan)
    inputs = read_inputs(plan, run_data(Path(cfg.model)) if plan.needs_data else None)
    with claimed(folder, key="output_dir", is_owner=process.rank == 0):
        plan = with_networks(plan, cfg, device)
        check_plan(plan, inputs)
        target = build_target(cfg, plan, trained, device)
        scores = evaluate(plan, inputs, target, folder, process)
    if scores is None:  # only the first process computes metrics
        return None
    print(report.table(scores))
    print(folder / "metrics.json")
    return first_score(cfg.metric[0], scores).value


def first_score(metric: str, scores: Mapping[str, Score]) -> Score:
    """The first score that a metric reports; score names may differ from the metric's."""
    prefixes = {
        "fid": "fd_",
        "kid": "kd_",
        "reconstruction": "stage_a/psnr",
        "rfid": "stage_a_train/r",
    }
    candidates = (metric, prefixes.get(metric, metric), "stage_")
    return next(
        score for prefix in candidates for name, score in scores.items() if name.startswith(prefix)
    )


def build_plan(cfg: DictConfig) -> EvaluationPlan:
    """The evaluation plan of a config, without networks."""
    return EvaluationPlan(
        metric=list(cfg.metric),
        prompts=cfg.prompts,
        images=cfg.images,
        num_prompts=cfg.num_prompts,
        reference=cfg.reference,
        baselines=list(cfg.baselines),
        height=cfg.height,
        width=cfg.width,
        seed=cfg.seed,
        settings=hydra.utils.instantiate(cfg.sample, _convert_="all"),
        cache_dir=cfg.cache_dir,
    )


def with_networks(plan: EvaluationPlan, cfg: DictConfig, device: torch.device) -> EvaluationPlan:
    """The plan with those networks that its metrics use."""
    networks: dict[str, Any] = {
        name: hydra.utils.instantiate(cfg[name], _convert_="all").eval().to(device)
        for name in ("fid_features", "clip", "pickscore")
        if plan.uses(name)
    }
    if cfg.lpips is not None and plan.uses("lpips"):
        networks["lpips"] = LPIPS(backbone=cfg.lpips).eval()
    return replace(plan, **networks)


def check_typed_keys(plan: EvaluationPlan) -> None:
    """Refuse keys on the command line that the chosen metrics do not read.

    Raises:
        ValueError: naming the first of them.
    """
    samples = plan.needs_generation or plan.needs_networks
    sized = plan.needs_generation and not plan.prompts_are_data
    reads = {
        **dict.fromkeys(("sample", "dtype", "prior", "variant", "allow_mismatch"), samples),
        **dict.fromkeys(("height", "width"), sized),
        "reference": bool({"fid", "kid"} & set(plan.metric)),
        **{name: plan.uses(name) for name in NETWORKS},
    }
    for key in typed_keys():
        if not reads.get(key.split(".")[0], True):
            raise ValueError(
                f"{key} is not read by metric={list(plan.metric)} with images={plan.images} and "
                f"prompts={plan.prompts}; remove it, or choose a metric that reads it"
            )


def check_model(cfg: DictConfig, plan: EvaluationPlan) -> str | None:
    """Check that the plan can be measured with ``model=``; returns the stage that it is a run of.

    Raises:
        FileNotFoundError: if a run has no checkpoint.
        ValueError: if neither a model nor images are set, the run is of a stage that generates no
            images, or a metric needs the data of a run.
    """
    if (plan.needs_generation or plan.needs_networks) and cfg.model is None:
        raise ValueError("model=null cannot generate images; set model=, or a folder with images=")
    trained = None if cfg.model is None else stage_of_run(cfg.model)
    if plan.needs_data and trained is None:
        data_metrics = [name for name in plan.metric if name in (*NETWORK_METRICS, "retrieval")]
        raise ValueError(
            f"model={cfg.model} is not a run, so it has no training data, which "
            f"metric={data_metrics or list(plan.metric)} with prompts={plan.prompts} and "
            f"reference={plan.reference} needs; choose other metrics, such as metric=[clip] "
            "with prompts=FILE or metric=[fid] with reference=FOLDER, or set model= to a run"
        )
    if trained in ("a", "b") and (plan.needs_generation or plan.needs_networks):
        raise ValueError(
            f"model={cfg.model} is a run of Stage {trained.upper()}, which generates no images; "
            "set model= to a run of Stage C, or to a model folder"
        )
    return trained


def build_target(
    cfg: DictConfig, plan: EvaluationPlan, trained: str | None, device: torch.device
) -> EvalTarget:
    """The model of a config, loaded once and only as far as the plan needs it."""
    metadata: dict[str, Any] = {"images": cfg.images} if cfg.images else {}
    pipeline: TextToImage | None = None
    stages: dict[str, StageWithLoss] = {}
    if plan.needs_generation or plan.needs_networks:
        dtype = sampling_dtype(cfg.dtype, device)
        pipeline, stages = _load_model(cfg, plan, trained, device, dtype)
        log_dtype(dtype, device)
        if cfg.compile and pipeline is not None:
            pipeline.compile()
        metadata |= {"model": str(cfg.model), "dtype": dtype_name(dtype)}
        metadata |= {key: cfg[key] for key in ("prior", "variant") if cfg[key] is not None}
        if pipeline is not None and pipeline.source is not None:
            metadata["checkpoint_sha256"] = pipeline.source["sha256"]
    return EvalTarget(metadata=metadata, pipeline=pipeline, stages=stages)


def _load_model(
    cfg: DictConfig,
    plan: EvaluationPlan,
    trained: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[TextToImage | None, dict[str, StageWithLoss]]:
    """The pipeline, and the stages whose loss is measured; the model is read only once.

    A Stage C without Stages B and A has no pipeline, of which losses alone need none.
    """
    source = {"prior": cfg.prior, "variant": cfg.variant}
    if "validation_loss" not in plan.metric or trained is None or any(source.values()):
        allowed = cfg.allow_mismatch
        pipeline = load_pipeline(
            cfg.model, **source, allow_mismatch=allowed, device=device, dtype=dtype
        )
        return pipeline, {}
    stage = cast(StageC | StageLDM, load_stage(source=cfg.model, stage=trained).to(device))
    if list(plan.metric) == ["validation_loss"] and not stage.can_draw:
        return None, stages_with_loss(stage)
    # losses are measured in float32, so a bfloat16 pipeline needs its own copy of the weights
    networks = stage if dtype == torch.float32 else copy.deepcopy(stage)
    return pipeline_from_stage(networks).to(device, dtype), stages_with_loss(stage)
