"""Normal ends of a run: each leaves a checkpoint, and resuming equals a run without that end."""

from collections.abc import Sequence
from pathlib import Path

from scripts.fault_injection.runs import Run, differing

ONLY_AT_THE_END = "checkpoint_every_steps=1000000"
SAME_FOR_ANY_LENGTH = (
    "stage.lr_schedule.decay=none", "stage.lr_schedule.warmup_steps=4",
    "stage.adversarial_start_step=20",
)  # fmt: skip
"""Schedules that the preset has in shares of the run."""


def ends(root: Path, *, steps: int, overrides: Sequence[str] = ()) -> list[str]:
    """End a run by each of its limits and resume it; returns what differs at the end.

    The run must take longer than 3 s, the time limit.
    """
    rest = [ONLY_AT_THE_END, *SAME_FOR_ANY_LENGTH, *overrides]
    undisturbed = Run(root / "undisturbed", steps, overrides=rest)
    undisturbed.finish()
    errors = []
    for limit in (f"max_steps={steps // 3}", "max_epochs=2", 'max_time="00:00:00:03"'):
        name = limit.partition("=")[0]
        Run(root / name, steps, overrides=[*rest, f"trainer.{limit}"]).finish()
        run = Run(root / name, steps, overrides=rest)
        print(f"{name}: a checkpoint of step {run.step()}")
        if not 0 < run.step() < steps:
            errors.append(f"{name} left no checkpoint of its end")
            continue
        run.finish()
        differences = differing(run.checkpoint(), undisturbed.checkpoint())
        errors += [f"{name}: {path}" for path in differences]
    return errors
