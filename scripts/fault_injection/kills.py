"""SIGKILL at random times: during startup, steps and saves, or of one of two processes."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from scripts.fault_injection.runs import Run, differing, wait_for


def kills(
    root: Path, *, times: int, steps: int, processes: int, seed: int, overrides: Sequence[str] = ()
) -> list[str]:
    """Kill a run ``times`` times; returns the paths of values that differ at the end."""
    rng = random.Random(seed)
    run = Run(root / "killed", steps, processes, overrides)
    for number in range(times):
        process, before = run.launch(), run.step()
        if rng.random() < 0.8:  # otherwise during startup
            wait_for(partial(run.is_beyond, before), process)
            time.sleep(rng.uniform(0, 1))
        else:
            time.sleep(rng.uniform(0, 8))
        kill(process, one_of=processes > 1, rng=rng)
        is_saving = any(run.folder.glob("checkpoints/*.partial"))
        print(f"kill {number + 1}: step {run.step()}", "during a save" if is_saving else "")
    run.finish()
    undisturbed = Run(root / "undisturbed", steps, processes, overrides)
    undisturbed.finish()
    return differing(run.checkpoint(), undisturbed.checkpoint())


def kill(process: subprocess.Popen[bytes], *, one_of: bool, rng: random.Random) -> None:
    """Kill a process with all its children, or only one child, and wait for it to exit."""
    workers = children(process.pid)
    if one_of and workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
    elif process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def children(pid: int) -> list[int]:
    """Process ids of the direct children."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []
