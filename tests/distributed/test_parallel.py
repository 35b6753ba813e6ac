"""Two processes train what one does: weights, averages, moments and losses, for every strategy.

gloo on the CPU runs the code that NCCL runs on GPUs.
"""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import run_program, small
from tests.distributed.launch import launch
from wuerstchen_pl.checkpointing import load

STEPS, HALF = 20, 10
ALIKE = 1e-5
OF_STAGE = {
    # Some biases of Stage A lie before a norm, which takes them out again: their gradients are
    # rounding errors, and Adam would make whole steps of these.
    "a": [
        "+stage.optimizer.eps=1e-2",
        "stage.optimizer.lr=2e-4",
        "stage.codebook_restart_every_steps=7",
        # An instance norm of one position makes its rounding error as large as a value.
        "stage.discriminator.depth=3",
        "stage.adversarial_start_step=5",
    ],
    "b": [],
    "c": [],
}
ASYNC_SAVE = "callbacks.checkpoints.async_save=true"
# name: what chooses the strategy, and what runs first, if it goes on from half the way
STRATEGIES = {
    "ddp": (["trainer=ddp"], None),
    "fsdp": (["trainer=fsdp"], None),
    "fsdp_one_file": (
        ["trainer=fsdp", "trainer.strategy.sharded_checkpoint=false", ASYNC_SAVE],
        None,
    ),
    "fsdp_checkpointed": (["trainer=fsdp", "activation_checkpointing=true", ASYNC_SAVE], None),
    "one_then_fsdp": (["trainer=fsdp"], "one"),
    "fsdp_then_ddp": (["trainer=ddp"], "fsdp"),
    "fsdp_then_fsdp": (["trainer=fsdp"], "fsdp"),
}


def arguments(stage: str, root: Path, cascade: Path, *more: str) -> list[str]:
    kept = [a for a in small(stage, root, STEPS) if not a.startswith(("validate", "data.batch"))]
    above = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    return [
        *kept, *above, f"paths.data={cascade.parent / 'data'}", *OF_STAGE[stage], *more,
        f"checkpoint_every_steps={HALF}", f"validate_every_steps={STEPS}", "ckpt=auto",
        "trainer.log_every_n_steps=1", "trainer.gradient_clip_val=0.1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cascade: Path) -> Path:
    """A folder with a folder for each strategy, and ``one`` for one process alone."""
    root = tmp_path_factory.mktemp("parallel")
    whole, half = "data.batch_size=8", "data.batch_size=4"
    first = f"trainer.max_steps={HALF}"
    two = ["trainer.devices=2", "trainer.accelerator=cpu", half]
    for stage in "abc":
        told = [whole, "trainer=cpu"]
        assert run_program("train", arguments(stage, root / "one", cascade, *told)) == 0
    told = ["trainer=cpu", whole, first]
    assert run_program("train", arguments("b", root / "one_then_fsdp", cascade, *told)) == 0
    jobs = []
    for name, (strategy, before) in STRATEGIES.items():
        if before == "fsdp":
            told = [*two, *STRATEGIES[before][0], first]
            jobs.append(arguments("b", root / name, cascade, *told))
        for stage in "abc" if name in ("ddp", "fsdp") else "b":
            jobs.append(arguments(stage, root / name, cascade, *two, *strategy))
    jobs.append(arguments("b", root / "fsdp_then_one", cascade, *two, "trainer=fsdp", first))
    launch(jobs, root)
    told = ["trainer=cpu", whole]
    assert run_program("train", arguments("b", root / "fsdp_then_one", cascade, *told)) == 0
    return root


def end_of(run: Path) -> dict[str, Any]:
    return load.read_checkpoint(load.find_checkpoint(run))


def tensors(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name: weights, averages, moments."""
    weights = dict(content["state_dict"])
    weights.pop("code_uses", None)  # counts of nearest codes, of which two may be as near
    found = {f"weight {k}": v for k, v in weights.items()}
    found |= {f"average {k}": v for k, v in content["ema"]["shadow"].items()}
    for number, state in content["optimizer_states"][0]["state"].items():
        # second moments are squares, and their differences too small to be seen
        roots = {name: v.sqrt() if "sq" in name else v for name, v in state.items()}
        found |= {f"{name} of {number}": value for name, value in roots.items()}
    return found


def farthest(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, str]:
    """The largest difference between two checkpoints, and where it is.

    Of a tensor with values beyond 1 it is relative to the largest of them.
    """
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1))

    return max((difference(v, theirs[k]), k) for k, v in mine.items())


def losses(run: Path) -> dict[tuple[str, str], float]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[1].startswith(("train/", "val/"))]
    return {(step, name): float(value) for step, name, value in rows}


CASES = [
    *((name, stage) for name in ("ddp", "fsdp") for stage in "abc"),
    *((name, "b") for name in (*list(STRATEGIES)[2:], "fsdp_then_one")),
]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_two_processes_train_what_one_does(runs: Path, name: str, stage: str) -> None:
    one, two = (end_of(runs / each / "default" / stage) for each in ("one", name))
    assert one["global_step"] == two["global_step"] == STEPS
    assert farthest(one, two)[0] < ALIKE, farthest(one, two)
    mine, theirs = (losses(runs / each / "default" / stage) for each in ("one", name))
    assert mine.keys() == theirs.keys()
    assert len({step for step, _ in mine}) == STEPS
    for key, value in mine.items():
        assert theirs[key] == pytest.approx(value, rel=ALIKE, abs=ALIKE), key


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_checkpoint_counts_the_samples_of_all_processes(
    runs: Path, name: str, stage: str
) -> None:
    """Whatever strategy wrote it, and also after a resume with another number of processes."""
    one, two = (end_of(runs / each / "default" / stage) for each in ("one", name))
    mine, theirs = (content["ImageTextDataModule"]["found"] for content in (one, two))
    assert mine["pixels"] > mine["pixels/kept"] > 0
    assert theirs == mine


@pytest.mark.parametrize("stage", "abc")
def test_the_comparison_sees_ten_steps(runs: Path, stage: str) -> None:
    run = runs / "one/default" / stage
    half = load.read_checkpoint(run / f"checkpoints/step{HALF:07d}.ckpt")
    assert farthest(half, end_of(run))[0] > 100 * ALIKE


def test_checkpoints_in_parts_are_those_of_fsdp_alone(runs: Path) -> None:
    kinds = {
        name: load.find_checkpoint(runs / name / "default/b").is_dir()
        for name in ("one", "ddp", "fsdp", "fsdp_one_file")
    }
    assert kinds == {"one": False, "ddp": False, "fsdp": True, "fsdp_one_file": False}


def test_a_sharded_run_draws_the_grid_that_one_process_draws(runs: Path) -> None:
    grids = [runs / name / f"default/c/grids/step{STEPS:07d}.png" for name in ("one", "fsdp")]
    one, sharded = (np.asarray(Image.open(grid)).astype(int) for grid in grids)
    # the first image's row: of the others, each process has its own
    assert min(len(one), len(sharded)) >= 80
    assert np.abs(one[:80] - sharded[:80]).max() <= 2


def test_codes_of_validation_are_counted_on_all_processes(runs: Path) -> None:
    def dead(name: str) -> list[str]:
        log = (runs / name / "default/a/metrics.csv").read_text().splitlines()
        return [line for line in log if "val/codebook_dead" in line]

    assert dead("one")
    assert dead("one") == dead("ddp") == dead("fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_end_when_the_first_cannot_write(
    strategy: str, cascade: Path, tmp_path: Path
) -> None:
    (tmp_path / "default/a").mkdir(parents=True)
    (tmp_path / "default/a/checkpoints").write_text("in the way")
    two = [f"trainer={strategy}", "trainer.devices=2", "trainer.accelerator=cpu"]
    job = arguments("a", tmp_path, cascade, "data.batch_size=4", *two)
    with pytest.raises(AssertionError, match="could not be written: File exists"):
        launch([job], tmp_path)


def test_a_shard_that_is_missing_is_no_tensor_of_garbage(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "alone.ckpt"
    shutil.copytree(load.find_checkpoint(runs / "fsdp/default/b"), path)
    parts = sorted(path.glob("*.safetensors"))
    assert len(parts) == 2
    load.read_checkpoint(path)
    for part in parts:
        kept = part.read_bytes()
        part.unlink()
        with pytest.raises(ValueError, match=r"alone\.ckpt is damaged, not a checkpoint"):
            load.read_checkpoint(path)
        part.write_bytes(kept)
