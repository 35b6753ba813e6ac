"""Small training runs that can be interrupted and resumed, and the comparison of their results."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from wuerstchen_pl.checkpointing import load

SMALL = (
    "stage=a", "stage.vqgan.width=16", "stage.vqgan.bottleneck_blocks=1",
    "stage.vqgan.codebook_size=16", "stage.discriminator.width=16", "stage.perceptual.widths=[4,8]",
    "stage.codebook_restart_every_steps=10", "data.limit=48", "data.val_fraction=0.2",
    "data.batch_size=4", "logger=csv", "callbacks.sample_grids=null", "trainer.accelerator=cpu",
    "checkpoint_every_steps=1", "validate_every_steps=50", "ckpt=auto",
)  # fmt: skip
COMPARED = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step")


class Run:
    """A training run of Stage A that can be interrupted and resumed.

    Args:
        root: folder of its outputs.
        steps: number of training steps.
        processes: number of processes.
        overrides: further keys of its command line.
    """

    def __init__(
        self, root: Path, steps: int, processes: int = 1, overrides: Sequence[str] = ()
    ) -> None:
        self.root, self.steps = root, steps
        self.processes, self.overrides = processes, overrides
        self.folder = root / "default/a"

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the run, or resume it."""
        command = ["-m", "wuerstchen_pl.train", *SMALL, f"trainer.max_steps={self.steps}"]
        command += [f"paths.root={self.root}", *self.overrides]
        if self.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            command = [*launcher, f"--nproc-per-node={self.processes}", *command]
            command += ["trainer=ddp", f"trainer.devices={self.processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *command], env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self) -> None:
        """Run to the end."""
        process = self.launch()
        _, stderr = process.communicate()
        if process.returncode:
            raise SystemExit(f"the run exited with {process.returncode}: {last_line(stderr)}")

    def step(self) -> int:
        """Step of the newest checkpoint, or -1."""
        checkpoints = self.folder.glob("checkpoints/step*.ckpt")
        return max(map(load.parse_step, checkpoints), default=-1)

    def is_beyond(self, step: int) -> bool:
        """Whether a checkpoint of a later step exists."""
        return self.step() > step

    def checkpoint(self) -> dict[str, Any]:
        """Contents of the newest checkpoint."""
        return load.read_checkpoint(load.find_checkpoint(self.folder))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until the condition is true or the process has exited."""
    while process.poll() is None and not condition():
        time.sleep(0.01)


def last_line(output: bytes) -> str:
    """The last line of a program's output."""
    return (output.decode(errors="replace").strip().splitlines() or [""])[-1]


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Paths of the values that are not bit-equal in two checkpoints."""
    return [path for key in COMPARED for path in _differing(one[key], other[key], key)]


def _differing(one: Any, other: Any, path: str) -> Iterator[str]:
    if isinstance(one, torch.Tensor):
        if not torch.equal(one, other):
            yield path
    elif isinstance(one, dict | list) and len(one) == len(other):
        for key in one if isinstance(one, dict) else range(len(one)):
            yield from _differing(one[key], other[key], f"{path}.{key}")
    elif one != other:
        yield path
