"""Inject faults into a training run: ``python -m scripts.fault_injection kills --times 50``.

kills: SIGKILL at random times, during startup, steps and saves; with ``--processes 2``, of one of
the two processes. full-disk: the disk fills up during the run, and is then enlarged. read-only: the
disk becomes read-only during the run, and then writable again.

After each fault the run resumes with ckpt=auto. At the end, every tensor and counter is compared
with those of an undisturbed run; the exit code is 1 if any differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
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


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until the condition is true or the process has exited."""
    while process.poll() is None and not condition():
        time.sleep(0.01)


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


def disk_fault(root: Path, *, kind: str, steps: int, overrides: Sequence[str] = ()) -> list[str]:
    """Fill a run's disk or make it read-only, then repair it; returns what differs at the end.

    Needs permission to mount, which ``main`` obtains with unshare.
    """
    (root / "disk").mkdir()
    size = "8m" if kind == "full-disk" else "200m"
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(root / "disk"))
    run = Run(root / "disk", steps, overrides=overrides)
    process = run.launch()
    if kind == "full-disk":
        wait_for(partial(run.is_beyond, -1), process)
        with suppress(OSError), (root / "disk/filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    else:
        wait_for(partial(run.is_beyond, steps // 3), process)
        os.kill(process.pid, signal.SIGSTOP)  # a remount fails while files are open for writing
        mount("-o", "remount,ro", str(root / "disk"))
        os.kill(process.pid, signal.SIGCONT)
    _, stderr = process.communicate()
    print(f"exit code {process.returncode} at step {run.step()}: {last_line(stderr)}")
    if process.returncode != 1 or run.step() >= steps:
        return ["the run did not report the fault"]
    run.checkpoint()  # raises if it is damaged
    mount("-o", "remount,rw,size=200m", str(root / "disk"))
    run.finish()
    undisturbed = Run(root / "undisturbed", steps, overrides=overrides)
    undisturbed.finish()
    return differing(run.checkpoint(), undisturbed.checkpoint())


def mount(*arguments: str) -> None:
    """Run mount, in this process's private namespace."""
    subprocess.run(["mount", *arguments], check=True)


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


def main() -> None:
    """The command-line program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["kills", "full-disk", "read-only"])
    parser.add_argument("overrides", nargs="*", help="keys of the run, such as trainer=fsdp")
    parser.add_argument("--times", type=int, default=50, help="number of kills")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the run")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run; kills only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    options = parser.parse_intermixed_args()
    if options.kind != "kills" and "FAULT_INJECTION_MAY_MOUNT" not in os.environ:
        command = [
            "unshare",
            "--map-root-user",
            "--mount",
            sys.executable,
            "-m",
            "scripts.fault_injection",
        ]
        environment = {**os.environ, "FAULT_INJECTION_MAY_MOUNT": "1"}
        sys.exit(subprocess.run([*command, *sys.argv[1:]], env=environment).returncode)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        if options.kind == "kills":
            differences = kills(
                root, times=options.times, steps=options.steps, processes=options.processes,
                seed=options.seed, overrides=options.overrides,
            )  # fmt: skip
        else:
            differences = disk_fault(
                root, kind=options.kind, steps=options.steps, overrides=options.overrides
            )
    if differences:
        shown = ", ".join(differences[:5])
        sys.exit(f"{len(differences)} values differ from the undisturbed run: {shown}")
    print("bit-equal to the undisturbed run")


if __name__ == "__main__":
    main()
