"""Real training runs on OpenMoji at 128 px: every stage, compiled, sharded, resumed."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from scripts.gpu_check.rows import Row, equal, failed
from scripts.gpu_check.sizes import Check
from scripts.gpu_check.syncs import sync_row
from scripts.gpu_check.training import GB

NAME = "programs"
"""Folder of the runs of Stages A to C, whose speed the ``openmoji`` section uses."""


class Run(NamedTuple):
    """One run of ``train``."""

    label: str
    stage: str
    overrides: tuple[str, ...] = ()
    name: str = NAME
    share: float = 1.0
    """Of the section's steps."""


def rows(check: Check) -> Iterator[Row]:
    """The exit code, loss, speed and synchronizations of each run."""
    b = f"paths.stage_b={check.work / NAME / 'b'}"
    sharded = (b, *sharded_trainer(), "callbacks.checkpoints.async_save=true")
    for run in (
        Run("Stage A", "a", (f"stage.adversarial_start_step={check.size.program_steps // 2}",)),
        Run("Stage B", "b"),
        Run("Stage C", "c"),
        Run("Stage C, compiled", "c", (b, "compile=true"), "compiled"),
        Run("Stage C, FSDP, async saves", "c", sharded, "fsdp", 0.5),
        Run("Stage C, FSDP, resumed", "c", (*sharded, "ckpt=auto"), "fsdp"),
    ):
        yield from run_rows(run, check)


def sharded_trainer() -> tuple[str, ...]:
    """Overrides for FSDP on one process."""
    cuda = torch.cuda.is_available()
    accelerator, precision = ("gpu", "bf16-mixed") if cuda else ("cpu", "32-true")
    return (
        "trainer=fsdp", "trainer.devices=1", f"trainer.accelerator={accelerator}",
        f"trainer.precision={precision}",
    )  # fmt: skip


def run_rows(run: Run, check: Check) -> Iterator[Row]:
    """Train, and read what the run wrote."""
    folder = check.work / run.name / run.stage
    report = check.work / f"{run.name}_{run.stage}.json"
    steps = round(check.size.program_steps * run.share)
    recorder = "callbacks.run_report"
    process = train(
        run.stage, run.name, steps, check,
        f"+{recorder}._target_=scripts.gpu_check.run_report.RunReport",
        f"+{recorder}.path={report}",
        # a step in which no loss is logged at full size
        f"+{recorder}.step={steps * 3 // 4}",
        *run.overrides,
    )  # fmt: skip
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        yield failed(f"{run.label}: exit code {process.returncode}", RuntimeError(lines[-1]))
        return
    yield equal(f"{run.label}: exit code", process.returncode, 0)
    yield from report_rows(run, folder, json.loads(report.read_text()))


def train(
    stage: str, name: str, steps: int, check: Check, *overrides: str
) -> subprocess.CompletedProcess[str]:
    """Run ``train`` on OpenMoji at 128 px with the tiny preset; its errors go to stderr too."""
    log_every = max(1, steps // 20)
    command = [
        sys.executable, "-m", "wuerstchen_pl.train", f"stage={stage}", "data=shards",
        f'data.urls="{check.shards}"', "data.val_fraction=0.03", "data.max_upscale=null",
        "data.num_workers=8", f"data.batch_size={check.size.program_batch}", "image_size=128",
        f"name={name}", f"paths.root={check.work}", f"trainer.max_steps={steps}",
        f"trainer={'gpu' if torch.cuda.is_available() else 'cpu'}", "trainer.gradient_clip_val=1.0",
        f"validate_every_steps={steps}", f"checkpoint_every_steps={max(1, steps // 2)}",
        "logger=csv", "stage.optimizer.lr=1e-3", "stage.lr_schedule.warmup_steps=20",
        f"trainer.log_every_n_steps={log_every}",
        f"callbacks.throughput.every_steps={5 * log_every}", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "HYDRA_FULL_ERROR": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    sys.stderr.write(process.stdout + process.stderr)
    return process


def report_rows(run: Run, folder: Path, report: dict) -> Iterator[Row]:
    """The loss, speed, memory and synchronizations of a finished run."""
    metrics = last_metrics(folder)
    measured = [f"loss {metrics['train/loss']:.4g}"]
    for name, form in (
        ("val/loss", "validation loss {:.4g}"), ("speed/samples_per_second", "{:.0f} images/s"),
        ("speed/data_wait", "data wait {:.0%}"), ("speed/mfu", "MFU {:.2%}"),
    ):  # fmt: skip
        if name in metrics:
            measured.append(form.format(metrics[name]))
    if report["peak_bytes"]:
        peak, estimate = (report[key] / GB for key in ("peak_bytes", "estimated_bytes"))
        measured.append(f"peak {peak:.2f} GB, estimate {estimate:.2f} GB")
    yield Row(run.label, ", ".join(measured))
    if "compile=true" in run.overrides:
        graphs = report["graphs"]
        yield Row(f"{run.label}: graphs", str(graphs), "more than 0", graphs > 0)
    yield sync_row(f"{run.label}: lines that wait for the GPU", report["syncs"])


def last_metrics(folder: Path) -> dict[str, float]:
    """The last logged value of each metric of a run."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
