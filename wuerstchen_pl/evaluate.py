"""Measure a model, or pictures: ``python -m wuerstchen_pl.evaluate model=outputs/demo/c``.

Several processes, by torchrun or the like, draw together.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

from wuerstchen_pl import checkpoint
from wuerstchen_pl.cli import command, output_folder
from wuerstchen_pl.config import check_config
from wuerstchen_pl.evaluation import report
from wuerstchen_pl.evaluation.data import run_data
from wuerstchen_pl.evaluation.drawing import Process
from wuerstchen_pl.evaluation.plan import OF_SETS, Plan
from wuerstchen_pl.evaluation.run import Subject, denoisers, evaluate
from wuerstchen_pl.metrics.score import Score
from wuerstchen_pl.models.perceptual import LPIPS
from wuerstchen_pl.pipeline.found import last_stage, pipeline_at

READ: Mapping[str, Any] = {
    "model": str | None,
    "prior": str | None,
    "images": str | None,
    "metric": list[str],
    "prompts": str,
    "num_prompts": int | None,
    "height": int | None,
    "width": int | None,
    "reference": str,
    "against": list[str],
    "features": dict,
    "clip": dict,
    "pickscore": dict,
    "lpips": str | None,
    "seed": int,
    "sample": dict,
    "output_dir": str,
    "cache_dir": str | None,
    "device": str | None,
    "bf16": bool,
}


def run(cfg: DictConfig) -> float | None:
    """Check, draw, measure, write; returns the first metric, which a sweep optimises."""
    check_config(cfg, READ)
    folder, process = output_folder(cfg.output_dir), Process.of_launch()
    device = cfg.device or _device()
    plan = build_plan(cfg, device)
    subject = build_subject(cfg, plan, device)
    scores = evaluate(plan, subject, folder, process)
    if scores is None:  # another process measures
        return None
    print(report.table(scores))
    print(folder / "metrics.json")
    return of_first(cfg.metric[0], scores).value


def of_first(metric: str, scores: Mapping[str, Score]) -> Score:
    """The score that the first metric is known by, under whatever name it goes."""
    names = {
        "fid": "fd_",
        "kid": "kd_",
        "reconstruction": "stage_a/psnr",
        "rfid": "stage_a_train/r",
    }
    wanted = (metric, names.get(metric, metric), "stage_")
    return next(s for start in wanted for name, s in scores.items() if name.startswith(start))


def _device() -> str:
    """Each process's own GPU, if there are any."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def build_plan(cfg: DictConfig, device: str) -> Plan:
    """The plan of a config, with only those networks that its metrics need."""
    wanted = {
        "features": {*OF_SETS, "rfid"} & set(cfg.metric),
        "clip": "clip" in cfg.metric,
        "pickscore": "pickscore" in cfg.metric,
    }
    judges: dict[str, nn.Module] = {
        name: hydra.utils.instantiate(cfg[name], _convert_="all").eval().to(device)
        for name, needed in wanted.items()
        if needed
    }
    if cfg.lpips is not None and "reconstruction" in cfg.metric:
        judges["lpips"] = LPIPS(backbone=cfg.lpips).eval()
    return Plan(
        metric=list(cfg.metric),
        prompts=cfg.prompts,
        images=cfg.images,
        num_prompts=cfg.num_prompts,
        reference=cfg.reference,
        against=list(cfg.against),
        height=cfg.height,
        width=cfg.width,
        seed=cfg.seed,
        settings=hydra.utils.instantiate(cfg.sample, _convert_="all"),
        cache_dir=cfg.cache_dir,
        **judges,  # type: ignore[arg-type]
    )


def build_subject(cfg: DictConfig, plan: Plan, device: str) -> Subject:
    """What a config names, loaded as far as the plan needs it.

    Raises:
        ValueError: if neither a model nor pictures are named.
    """
    pipeline = None
    facts: dict[str, Any] = {"images": cfg.images} if cfg.images else {}
    if plan.draws or plan.of_networks:
        if cfg.model is None:
            raise ValueError("model=null draws nothing; name a model, or pictures with images=")
        dtype = torch.bfloat16 if cfg.bf16 else torch.float32
        pipeline = pipeline_at(cfg.model, prior=cfg.prior, device=device, dtype=dtype)
        facts |= {"model": str(cfg.model), "bf16": cfg.bf16}
        facts |= {} if cfg.prior is None else {"prior": cfg.prior}
        if pipeline.source is not None:
            facts["checkpoint_sha256"] = pipeline.source["sha256"]
    stages: dict[str, Any] = {}
    if "validation_loss" in plan.metric:
        name = last_stage(cfg.model) or "c"
        stages = denoisers(checkpoint.load_stage(run=cfg.model, stage=name).to(device))
    data = None
    if plan.of_data:
        if cfg.model is None or last_stage(cfg.model) is None:
            raise ValueError(
                f"model={cfg.model} is no run, and so has no data of its own; set prompts= and "
                "reference= to files and folders, and metric= to those that need no data"
            )
        data = run_data(Path(cfg.model))
    return Subject(facts=facts, pipeline=pipeline, stages=stages, data=data)


main = command("evaluate", run)

if __name__ == "__main__":
    main()
