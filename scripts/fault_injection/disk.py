"""A disk that fills up or becomes read-only during a run, and is then repaired."""

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from scripts.fault_injection.runs import Run, differing, last_line, wait_for


def disk_fault(root: Path, *, kind: str, steps: int, overrides: Sequence[str] = ()) -> list[str]:
    """Fill a run's disk or make it read-only, then repair it; returns what differs at the end.

    Needs permission to mount, which ``main`` obtains with unshare.
    """
    disk = str(root / "disk")
    os.mkdir(disk)
    size = "8m" if kind == "full-disk" else "200m"
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk)
    run = Run(root / "disk", steps, overrides=overrides)
    process = run.launch()
    if kind == "full-disk":
        wait_for(partial(run.is_beyond, -1), process)
        with suppress(OSError), (root / "disk/filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    else:
        wait_for(partial(run.is_beyond, steps // 3), process)
        # A remount of the disk itself would fail, as the run's lock is open for writing.
        mount("--bind", disk, disk)
        mount("-o", "remount,bind,ro", disk)
    _, stderr = process.communicate()
    print(f"exit code {process.returncode} at step {run.step()}: {last_line(stderr)}")
    if process.returncode != 1 or run.step() >= steps:
        return ["the run did not report the fault"]
    run.checkpoint()  # raises if it is damaged
    if kind == "full-disk":
        mount("-o", "remount,size=200m", disk)
    else:
        subprocess.run(["umount", disk], check=True)
    run.finish()
    undisturbed = Run(root / "undisturbed", steps, overrides=overrides)
    undisturbed.finish()
    return differing(run.checkpoint(), undisturbed.checkpoint())


def mount(*arguments: str) -> None:
    """Run mount, in this process's private namespace."""
    subprocess.run(["mount", *arguments], check=True)
