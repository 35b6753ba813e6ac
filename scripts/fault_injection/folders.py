"""Two programs in one output folder: the second is refused, or takes over from a killed first."""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from scripts.fault_injection.runs import SMALL, last_line, wait_for
from wuerstchen_pl.io.folder_lock import LOCK
from wuerstchen_pl.io.images import write_png

TRAIN = [*(key for key in SMALL if not key.startswith(("stage", "checkpoint_every"))),
         "preset=tiny", "image_size=64", "checkpoint_every_steps=5"]  # fmt: skip
DATA = [key for key in SMALL if key.startswith("data.")]
RESULTS = {".png", ".safetensors", ".tar"}
"""Files that are the same whenever a program runs to its end."""


def folders(root: Path) -> list[str]:
    """Start each program twice in a folder; returns what is not as expected."""
    paths = [f"paths.root={root}/models", f"paths.data={root}/data"]
    for stage in "abc":
        model = [f"stage={stage}", *TRAIN, *paths, "trainer.max_steps=5"]
        subprocess.run(command("train", model), check=True, capture_output=True)
    images = root / "models/default/images"
    images.mkdir()
    for number in range(200):
        pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(number))
        write_png(images / f"{number}.png", pixels, {})
        (images / f"{number}.txt").write_text("noise")
    return [
        f"{name}: {error}"
        for name, (program, arguments, key) in commands(root / "models/default", paths).items()
        for error in _check(program, arguments, key, root / name)
    ]


def commands(models: Path, paths: list[str]) -> dict[str, tuple[str, list[str], str]]:
    """Name -> program, its arguments without the output folder, and the key of that folder."""
    model, few = f"model={models}/c", ["sample.prior_steps=2", "sample.decoder_steps=2"]
    scores = ["metric=[kid]", "fid_features=random", f"cache_dir={models}/features"]
    return {
        "train": ("train", ["stage=a", *TRAIN, *paths, "trainer.max_steps=5"], "paths.output_dir"),
        "cache": ("cache", ["stage=c", "preset=tiny", *DATA, *paths], "out"),
        "data build": ("data build", [f"from={models}/images", "image_size=64"], "to"),
        "sample": ("sample", [model, "prompt=[a heart,a bird,a tree]", *few], "output_dir"),
        "evaluate": ("evaluate", [model, *scores, "num_prompts=12", *few], "output_dir"),
    }


def command(program: str, arguments: list[str]) -> list[str]:
    """The command line of a program."""
    module, *verb = program.split()
    return [sys.executable, "-m", f"wuerstchen_pl.{module}", *verb, *arguments]


def _check(program: str, arguments: list[str], key: str, root: Path) -> Iterator[str]:
    refused, taken_over = root / "refused", root / "taken_over"
    first = _start(program, [*arguments, f"{key}={refused}"], refused)
    os.kill(first.pid, signal.SIGSTOP)  # so that both run at the same time
    second = subprocess.run(command(program, [*arguments, f"{key}={refused}"]), capture_output=True)
    os.kill(first.pid, signal.SIGCONT)
    message = last_line(second.stderr)
    print(f"{program}: {message}")
    if second.returncode != 1 or f"{key}={refused} is in use by process {first.pid}" not in message:
        yield f"the second program exited with {second.returncode}: {message}"
    _, stderr = first.communicate()
    if first.returncode:
        yield f"the first program exited with {first.returncode}: {last_line(stderr)}"
    killed = _start(program, [*arguments, f"{key}={taken_over}"], taken_over)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    third = subprocess.run(
        command(program, [*arguments, f"{key}={taken_over}"]), capture_output=True
    )
    if third.returncode:
        yield f"after a kill it exited with {third.returncode}: {last_line(third.stderr)}"
    if _results(refused) != _results(taken_over):
        yield f"results differ: {_results(refused)} and {_results(taken_over)}"


def _start(program: str, arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a program and wait until it has claimed its folder."""
    process = subprocess.Popen(
        command(program, arguments), start_new_session=True, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for((folder / LOCK).exists, process)
    return process


def _results(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.suffix in RESULTS)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in files}
