"""Do to a run what machines do to it: ``python -m scripts.fault_injection kills --times 50``.

kills: SIGKILL at random moments, while it starts, steps and saves; with ``--processes 2``, of one
process of two. full-disk: the disk fills up during it, and is enlarged. read-only: its
folder can no longer be written, and then can again.

After each the run goes on with ckpt=auto, and at its end every tensor and counter is compared with
those of a run that nobody disturbed. Exit code 1 if one differs.
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
    """One run, of however many lives.

    Args:
        root: where it is written.
        steps: of the whole run.
        processes: of each life.
        more: keys of its command line.
    """

    def __init__(
        self, root: Path, steps: int, processes: int = 1, more: Sequence[str] = ()
    ) -> None:
        self.root, self.steps, self.processes, self.more = root, steps, processes, more
        self.folder = root / "default/a"

    def live(self) -> subprocess.Popen[bytes]:
        """Start it, or go on."""
        module = ["-m", "wuerstchen_pl.train", *SMALL, f"trainer.max_steps={self.steps}"]
        module += [f"paths.root={self.root}", *self.more]
        if self.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            module = [*launcher, f"--nproc-per-node={self.processes}", *module]
            module += ["trainer=ddp", f"trainer.devices={self.processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, *module], env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self) -> None:
        """Let it go on to its end."""
        process = self.live()
        _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"it ended with {process.returncode}: {last_line(said)}")

    def step(self) -> int:
        """The newest step that has a checkpoint, or -1."""
        found = self.folder.glob("checkpoints/step*.ckpt")
        return max(map(load.parse_step, found), default=-1)

    def is_beyond(self, step: int) -> bool:
        """Whether there is a checkpoint of a later step."""
        return self.step() > step

    def end(self) -> dict[str, Any]:
        """The newest checkpoint."""
        return load.read_checkpoint(load.find_checkpoint(self.folder))


def kills(
    root: Path, *, times: int, steps: int, processes: int, seed: int, more: Sequence[str] = ()
) -> list[str]:
    """Kill a run so many times; what differs at the end."""
    rng = random.Random(seed)
    run = Run(root / "killed", steps, processes, more)
    for number in range(times):
        process, before = run.live(), run.step()
        if rng.random() < 0.8:  # or else while it starts
            wait_for(partial(run.is_beyond, before), process)
            time.sleep(rng.uniform(0, 1))
        else:
            time.sleep(rng.uniform(0, 8))
        kill(process, one_of=processes > 1, rng=rng)
        begun = any(run.folder.glob("checkpoints/*.partial"))
        print(f"kill {number + 1}: step {run.step()}", "during saving" if begun else "")
    run.finish()
    whole = Run(root / "whole", steps, processes, more)
    whole.finish()
    return differing(run.end(), whole.end())


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until something has happened, or the process has ended."""
    while process.poll() is None and not happened():
        time.sleep(0.01)


def kill(process: subprocess.Popen[bytes], *, one_of: bool, rng: random.Random) -> None:
    """Kill a process and all of its own, or one of those that it started, and wait for the end."""
    workers = children(process.pid)
    if one_of and workers:
        os.kill(rng.choice(workers), signal.SIGKILL)
    elif process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def children(pid: int) -> list[int]:
    """The processes that one started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(each) for each in path.read_text().split()] if path.exists() else []


def trouble(root: Path, *, kind: str, steps: int, more: Sequence[str] = ()) -> list[str]:
    """Let a run's disk fill up, or turn read-only, and fix it; what differs at the end.

    It has to run where it may mount: `main` sees to that.
    """
    (root / "disk").mkdir()
    size = "8m" if kind == "full-disk" else "200m"
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(root / "disk"))
    run = Run(root / "disk", steps, more=more)
    process = run.live()
    if kind == "full-disk":
        wait_for(partial(run.is_beyond, -1), process)
        with suppress(OSError), (root / "disk/filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
    else:
        wait_for(partial(run.is_beyond, steps // 3), process)
        os.kill(process.pid, signal.SIGSTOP)  # nothing may be open while it is mounted anew
        mount("-o", "remount,ro", str(root / "disk"))
        os.kill(process.pid, signal.SIGCONT)
    _, said = process.communicate()
    print(f"it ended with {process.returncode} at step {run.step()}: {last_line(said)}")
    if process.returncode != 1 or run.step() >= steps:
        return ["the run did not notice"]
    run.end()  # whole, or it raises
    mount("-o", "remount,rw,size=200m", str(root / "disk"))
    run.finish()
    whole = Run(root / "whole", steps, more=more)
    whole.finish()
    return differing(run.end(), whole.end())


def mount(*arguments: str) -> None:
    """Mount, in a namespace of our own."""
    subprocess.run(["mount", *arguments], check=True)


def last_line(said: bytes) -> str:
    """The last line that a program wrote."""
    return (said.decode(errors="replace").strip().splitlines() or [""])[-1]


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Places where two checkpoints differ by as little as a bit."""
    return [place for key in COMPARED for place in _differing(one[key], other[key], key)]


def _differing(one: Any, other: Any, place: str) -> Iterator[str]:
    if isinstance(one, torch.Tensor):
        if not torch.equal(one, other):
            yield place
    elif isinstance(one, dict | list) and len(one) == len(other):
        for key in one if isinstance(one, dict) else range(len(one)):
            yield from _differing(one[key], other[key], f"{place}.{key}")
    elif one != other:
        yield place


def main() -> None:
    """The command-line program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["kills", "full-disk", "read-only"])
    parser.add_argument("more", nargs="*", help="keys of the run, such as trainer=fsdp")
    parser.add_argument("--times", type=int, default=50, help="kills")
    parser.add_argument("--steps", type=int, default=600, help="of the run")
    parser.add_argument("--processes", type=int, default=1, help="of the run that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_intermixed_args()
    if options.kind != "kills" and "TORTURE_MAY_MOUNT" not in os.environ:
        command = [
            "unshare",
            "--map-root-user",
            "--mount",
            sys.executable,
            "-m",
            "scripts.fault_injection",
        ]
        environment = {**os.environ, "TORTURE_MAY_MOUNT": "1"}
        sys.exit(subprocess.run([*command, *sys.argv[1:]], env=environment).returncode)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        if options.kind == "kills":
            found = kills(
                root, times=options.times, steps=options.steps, processes=options.processes,
                seed=options.seed, more=options.more,
            )  # fmt: skip
        else:
            found = trouble(root, kind=options.kind, steps=options.steps, more=options.more)
    if found:
        sys.exit(f"differs from the undisturbed run: {', '.join(found[:5])} of {len(found)}")
    print("bit-equal to the undisturbed run")


if __name__ == "__main__":
    main()
