"""SIGTERM and SIGINT at random times of the start, before the first step."""

import os
import random
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from scripts.fault_injection.runs import Run, differing, last_line, wait_for
from wuerstchen_pl.cli.signals import INTERRUPTED, REQUEUE

CODES = {signal.SIGTERM: REQUEUE, signal.SIGINT: INTERRUPTED}
INTERPRETER_SECONDS = 0.1
"""Until then no line of the package may have run, so Python's own exit codes are accepted."""


def startup(
    root: Path, *, times: int, steps: int, seed: int, overrides: Sequence[str] = ()
) -> list[str]:
    """Stop a starting run ``times`` times, then run it; returns what is not as expected."""
    rng = random.Random(seed)
    undisturbed = Run(root / "undisturbed", steps, overrides=overrides)
    start, process = time.monotonic(), undisturbed.launch()
    wait_for(partial(undisturbed.is_beyond, -1), process)
    seconds = time.monotonic() - start
    process.communicate()
    errors = []
    for number in range(times):
        run = Run(root / f"run{number}", steps, overrides=overrides)
        signum, delay = rng.choice(list(CODES)), rng.uniform(0, seconds)
        process = run.launch()
        time.sleep(delay)
        os.kill(process.pid, signum)
        _, stderr = process.communicate()
        where = f"{signum.name} after {delay:.2f} s of {seconds:.2f} s"
        print(f"{where}: exit code {process.returncode}, {last_line(stderr)}")
        codes = {CODES[signum]} | ({-signum} if delay < INTERPRETER_SECONDS else set())
        if process.returncode not in codes or b"Traceback" in stderr:
            errors.append(f"{where}: exit code {process.returncode}, {last_line(stderr)}")
        if partial_files := [path.name for path in run.root.rglob("*.partial")]:
            errors.append(f"{where}: left {', '.join(partial_files)}")
        run.finish()
        errors += [f"{where}: {p}" for p in differing(run.checkpoint(), undisturbed.checkpoint())]
    return errors
