"""Runs that are killed and resumed end with the weights of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import small, what_cache_reads
from tests.data.factories import image, shards
from tests.data.serving import serve
from tests.test_resume import differing
from wuerstchen_pl.checkpointing import load

pytestmark = pytest.mark.slow
STEPS = 40  # several epochs


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    shards(tmp_path / "served", 5, 5)
    for server in serve(tmp_path / "served"):
        yield server.url + "/{00000..00004}.tar"


def data_arguments(kind: str, tmp_path: Path, web: str, cascade: Path) -> list[str]:
    """Create data of a kind; returns the arguments that select it."""
    if kind == "web":
        return ["data=shards", f"data.urls='{web}'", f"data.download_dir={tmp_path / 'down'}"]
    if kind == "shards":
        shards(tmp_path / "tars", 5, 5)
        return ["data=shards", f"data.urls={tmp_path / 'tars'}"]
    if kind == "folder":
        (tmp_path / "images").mkdir()
        for i in range(24):
            (tmp_path / f"images/{i}.jpg").write_bytes(image(str(i), 40 + i, 48))
            (tmp_path / f"images/{i}.txt").write_text(f"number {i}")
        return ["data=folder", f"data.root={tmp_path / 'images'}"]
    images = data_arguments("shards", tmp_path, web, cascade)
    stage_paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    command = [
        *what_cache_reads(arguments(tmp_path / "none", images, 0)),
        *stage_paths,
        f"out={tmp_path / 'cache'}",
    ]
    subprocess.run([sys.executable, "-m", "wuerstchen_pl.cache", *command], check=True)
    return ["data=cached", f"data.root={tmp_path / 'cache'}"]


def arguments(root: Path, data: list[str], workers: int) -> list[str]:
    usual = [a for a in small("c", root, STEPS) if not a.startswith(("data.limit", "validate_"))]
    more = ["data.shuffle_samples=12", "validate_every_steps=10", "checkpoint_every_steps=1"]
    if "data=cached" in data:
        usual = [a for a in usual if not a.startswith("data.val_fraction")]
    else:
        more.append("data.max_upscale=null")
    return [*usual, *more, *data, f"data.num_workers={workers}"]


def start(overrides: list[str], processes: int) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*(launcher if processes > 1 else []), "-m", "wuerstchen_pl.train", *overrides]
    if processes > 1:
        command += ["trainer=ddp", f"trainer.devices={processes}", "trainer.accelerator=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, start_new_session=True,
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def kill_at(process: subprocess.Popen, run: Path, step: int) -> None:
    """Kill a run with all its processes once it has a checkpoint of ``step``."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(load.parse_step(p) >= step for p in run.glob("checkpoints/step*.ckpt")):
            break
        time.sleep(0.02)
    assert process.poll() is None, "the run ended before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("kind", "workers", "processes"),
    [("shards", 0, 1), ("web", 2, 1), ("folder", 2, 1), ("cached", 2, 1), ("shards", 2, 2)],
)
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    kind: str, workers: int, processes: int, cascade: Path, tmp_path: Path, web: str
) -> None:
    data = data_arguments(kind, tmp_path, web, cascade)
    stage_paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]

    def overrides(name: str) -> list[str]:
        return [*arguments(tmp_path / name, data, workers), *stage_paths]

    check_kills(overrides, tmp_path, processes)


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_a_killed_run_of_an_adapter_ends_with_the_weights_of_an_undisturbed_one(
    base_dtype: str, cascade: Path, tmp_path: Path
) -> None:
    """With a cache that the run makes, as in the recipe."""
    left_out = ("stage.prior", "stage.text_encoder", "validate_")
    adapter = [f"stage.adapter.base_dtype={base_dtype}", "trainer.precision=bf16-mixed"]

    def overrides(name: str) -> list[str]:
        usual = [a for a in small("c", tmp_path / name, STEPS) if not a.startswith(left_out)]
        return [
            *usual, "experiment=lora", "name=default", f"init_from={cascade / 'c'}", *adapter,
            "data=openmoji", "image_size=64", "bucket_multiple=16", "checkpoint_every_steps=1",
            "validate_every_steps=10",
        ]  # fmt: skip

    check_kills(overrides, tmp_path)


def check_kills(overrides: Callable[[str], list[str]], root: Path, processes: int = 1) -> None:
    """Train a run in one piece, and one that is killed twice; compare all their tensors."""
    assert start(overrides("whole"), processes).wait(timeout=300) == 0
    run = root / "parts/default/c"
    for step in (5, 17):
        kill_at(start([*overrides("parts"), "ckpt=auto"], processes), run, step)
    assert start([*overrides("parts"), "ckpt=auto"], processes).wait(timeout=300) == 0
    whole = load.read_checkpoint(load.find_checkpoint(root / "whole/default/c"))
    parts = load.read_checkpoint(load.find_checkpoint(run))
    assert whole["global_step"] == parts["global_step"] == STEPS
    assert not differing(whole, parts)
