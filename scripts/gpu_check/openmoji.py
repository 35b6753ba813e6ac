"""Train Stages A, B and C on OpenMoji at 128 px for as long as time is left; keep their grids."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from scripts.gpu_check.programs import NAME, last_metrics, train
from scripts.gpu_check.rows import Row, failed
from scripts.gpu_check.sizes import Check
from wuerstchen_pl.plural import plural

SHARES = {"a": 0.25, "b": 0.45, "c": 1.0}
"""Stage -> its share of the time that is left when it starts."""
START_UP = 20.0
"""Seconds of a run that are not training: imports, workers, validation, the grid."""


def rows(check: Check) -> Iterator[Row]:
    """The steps, time and validation loss of each stage; ``grid_<stage>.png`` has samples."""
    deadline = time.monotonic() + check.seconds
    for stage, share in SHARES.items():
        seconds = share * (deadline - time.monotonic()) - START_UP
        steps = fitting_steps(seconds, stage, check)
        start = time.monotonic()
        process = train(
            stage, "openmoji", steps, check,
            "stage.ema.decay=0.995",
            f"validate_every_steps={max(1, steps // 2)}", *stage_overrides(stage, steps),
        )  # fmt: skip
        what = f"Stage {stage.upper()}, {plural(steps, 'step')}"
        if process.returncode:
            yield failed(what, RuntimeError(process.stderr.strip().splitlines()[-1]))
            return
        folder = check.work / "openmoji" / stage
        loss = last_metrics(folder)["val/loss"]
        grid = copy_grid(folder, check.out / f"grid_{stage}.png")
        duration = time.monotonic() - start
        yield Row(what, f"{duration:.0f} s, validation loss {loss:.4g}, {grid}")


def fitting_steps(seconds: float, stage: str, check: Check) -> int:
    """Training steps that fit in a time at the speed of the programs section, at least its own."""
    rate = last_metrics(check.work / NAME / stage)["speed/samples_per_second"]
    steps = int(seconds * rate / check.size.program_batch)
    return max(check.size.program_steps, steps) if check.size.full else check.size.program_steps


def stage_overrides(stage: str, steps: int) -> list[str]:
    """What the stages differ in; the learning rates are those of ``experiment=openmoji``."""
    if stage == "a":
        return ["stage.optimizer.lr=2e-3", f"stage.adversarial_start_step={steps * 2 // 3}"]
    return ["stage.optimizer.lr=1e-3"]


def copy_grid(folder: Path, target: Path) -> str:
    """Copy a run's last sample grid; returns its name."""
    shutil.copyfile(max((folder / "grids").glob("step*.png")), target)
    return target.name
