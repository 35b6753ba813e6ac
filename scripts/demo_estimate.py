"""How long the demo's training takes on this machine, from a few steps of each stage."""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

from hydra import compose, initialize_config_dir

from wuerstchen_pl.cli.config import conf_dir

STEPS = 20
"""Steps of each stage, of which the second half counts: metrics are logged every tenth step."""


def training_minutes(arguments: list[str], data: Path) -> float:
    """Minutes that training Stages A, B and C takes, without validation, grids and start-up.

    Args:
        arguments: of ``train`` for all stages: experiment and precision.
        data: folder where the demo's data are kept.

    Raises:
        SystemExit: if a stage cannot be trained, with its exit code.
    """
    with tempfile.TemporaryDirectory() as root:
        seconds = sum(_training_seconds(stage, arguments, Path(root), data) for stage in "abc")
    return seconds / 60


def _training_seconds(stage: str, arguments: list[str], root: Path, data: Path) -> float:
    typed = [f"stage={stage}", *arguments, f"paths.root={root}", f"paths.data={data}"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("train", typed)
    measured = [f"trainer.max_steps={STEPS}", f"callbacks.throughput.every_steps={STEPS // 2}"]
    off = [f"callbacks.{name}=null" for name in ("sample_grids", "final_validation", "progress")]
    quick = ["validate_every_steps=1000", "stage.lr_schedule.warmup_steps=0", "logger=csv"]
    command = [sys.executable, "-m", "wuerstchen_pl.train", *typed, *measured, *off, *quick]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        sys.exit(done.returncode)
    with (root / cfg.name / stage / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["value"]) for row in rows if row["metric"] == "speed/samples_per_second"]
    return cfg.trainer.max_steps * cfg.data.batch_size / rates[-1]
