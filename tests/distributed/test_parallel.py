"""Two processes train like one, for every strategy: weights, EMA, optimizer state and losses.

The processes use gloo on the CPU, with the same code as NCCL on GPUs.
"""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import NO_GRIDS, run_program, small
from tests.data.factories import image
from tests.distributed.launch import launch
from wuerstchen_pl.checkpointing import load

pytestmark = pytest.mark.slow
STEPS, HALF = 20, 10
TOLERANCE = 1e-5
STAGE_OVERRIDES = {
    # Some biases of Stage A have no effect, as a norm follows them: their gradients are rounding
    # errors, which Adam would amplify to full steps.
    "a": [
        "+stage.optimizer.eps=1e-2",
        "stage.optimizer.lr=2e-4",
        "stage.codebook_restart_every_steps=7",
        # An instance norm over one position would amplify rounding errors to the size of values.
        "stage.discriminator.depth=3",
        "stage.adversarial_start_step=5",
    ],
    "b": [],
    "c": [],
}
ASYNC_SAVE = "callbacks.checkpoints.async_save=true"
# name: (overrides of the strategy, strategy of the run that it resumes at half of the steps)
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
    dropped = ("validate", "data.batch", NO_GRIDS)
    kept = [a for a in small(stage, root, STEPS) if not a.startswith(dropped)]
    paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    return [
        *kept, *paths, f"paths.data={cascade.parent / 'data'}", *STAGE_OVERRIDES[stage], *more,
        f"checkpoint_every_steps={HALF}", f"validate_every_steps={HALF}", "ckpt=auto",
        "trainer.log_every_n_steps=1", "trainer.gradient_clip_val=0.1",
    ]  # fmt: skip


# one on each of two nodes, with two micro-batches: weights are sharded within a node only
HYBRID = [
    "trainer=fsdp", "trainer.num_nodes=2", "trainer.devices=1", "trainer.accelerator=cpu",
    "data.batch_size=2", "global_batch=8",
]  # fmt: skip
ONE_ACCUMULATED = ["trainer=cpu", "data.batch_size=4", "global_batch=8"]
TWO = ["trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=4"]
ONE = ["trainer=cpu", "data.batch_size=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cascade: Path) -> Path:
    """A folder with a folder per strategy, and ``one`` for a single process."""
    root = tmp_path_factory.mktemp("parallel")
    half_steps = f"trainer.max_steps={HALF}"
    for stage in "abc":
        assert run_program("train", arguments(stage, root / "one", cascade, *ONE)) == 0
    overrides = arguments("b", root / "one_then_fsdp", cascade, *ONE, half_steps)
    assert run_program("train", overrides) == 0
    jobs = []
    for name, (strategy, resumed) in STRATEGIES.items():
        if resumed == "fsdp":
            first = [*TWO, *STRATEGIES[resumed][0], half_steps]
            jobs.append(arguments("b", root / name, cascade, *first))
        for stage in "abc" if name in ("ddp", "fsdp") else "b":
            jobs.append(arguments(stage, root / name, cascade, *TWO, *strategy))
    jobs.append(arguments("b", root / "fsdp_then_one", cascade, *TWO, "trainer=fsdp", half_steps))
    launch(jobs, root)
    assert run_program("train", arguments("b", root / "fsdp_then_one", cascade, *ONE)) == 0
    return root


def last_checkpoint(run: Path) -> dict[str, Any]:
    return load.read_checkpoint(load.find_checkpoint(run))


def tensors(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name: weights, EMA weights and optimizer state."""
    weights = dict(content["state_dict"])
    weights.pop("code_uses", None)  # counts of nearest codes, which ties may change
    named = {f"weight {k}": v for k, v in weights.items()}
    named |= {f"ema {k}": v for k, v in content["ema"]["shadow"].items()}
    for index, state in content["optimizer_states"][0]["state"].items():
        # differences of squared gradients would be too small to detect, so compare their roots
        roots = {name: v.sqrt() if "sq" in name else v for name, v in state.items()}
        named |= {f"{name} of {index}": value for name, value in roots.items()}
    return named


def max_difference(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, str]:
    """The largest difference between two checkpoints, and the name of its tensor.

    For a tensor with values above 1, it is relative to the largest value.
    """
    tensors_one, tensors_other = tensors(one), tensors(other)
    assert tensors_one.keys() == tensors_other.keys()

    def difference(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1))

    return max((difference(v, tensors_other[k]), k) for k, v in tensors_one.items())


def losses(run: Path) -> dict[tuple[str, str], float]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[1].startswith(("train/", "val/"))]
    return {(step, name): float(value) for step, name, value in rows}


CASES = [
    *((name, stage) for name in ("ddp", "fsdp") for stage in "abc"),
    *((name, "b") for name in (*list(STRATEGIES)[2:], "fsdp_then_one")),
]


def check_equal(runs: Path, name: str, stage: str, reference: str = "one") -> None:
    """Two runs have the same weights, EMA, optimizer state, losses and data counts."""
    one, two = (last_checkpoint(runs / run / "default" / stage) for run in (reference, name))
    assert one["global_step"] == two["global_step"] == STEPS
    assert max_difference(one, two)[0] < TOLERANCE, max_difference(one, two)
    counts_one, counts_two = (
        content["ImageTextDataModule"]["worker_counts"] for content in (one, two)
    )
    assert counts_one["pixels"] > counts_one["pixels/kept"] > 0
    assert counts_two == counts_one
    losses_one, losses_two = (losses(runs / run / "default" / stage) for run in (reference, name))
    assert losses_one.keys() == losses_two.keys()
    assert len({step for step, _ in losses_one}) == STEPS
    for key, value in losses_one.items():
        assert losses_two[key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), key


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_two_processes_train_like_one(runs: Path, name: str, stage: str) -> None:
    check_equal(runs, name, stage)


def test_two_nodes_that_accumulate_gradients_train_like_one_process(
    cascade: Path, tmp_path: Path
) -> None:
    """Hybrid sharding: gradients are scattered within a node, and summed over nodes."""
    overrides = arguments("b", tmp_path / "one_accumulated", cascade, *ONE_ACCUMULATED)
    assert run_program("train", overrides) == 0
    launch([arguments("b", tmp_path / "hybrid", cascade, *HYBRID)], tmp_path, processes=1, nodes=2)
    assert load.find_checkpoint(tmp_path / "hybrid/default/b").is_dir()
    check_equal(tmp_path, "hybrid", "b", "one_accumulated")


def test_two_processes_train_like_one_with_masks_weights_and_changed_captions(
    cascade: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(24):
        (images / f"{number}.jpg").write_bytes(image(f"{number}", 70, 64))
        (images / f"{number}.txt").write_text(f"number {number}, a, b, c")
        (images / f"{number}.json").write_text(json.dumps({"weight": number / 8}))
        if number % 3:
            mask = Image.new("L", (70, 64))
            mask.paste(255, (0, 0, 70, 2 * number))
            mask.save(images / f"{number}.mask.png")
    data = [f"data.root={images}", "data.mask=file", "data.num_workers=0"]
    data += ["data.captions.shuffle_tags=true", "data.captions.drop_tag_prob=0.3"]

    def command(run: str, *more: str) -> list[str]:
        kept = [a for a in arguments("c", tmp_path / run, cascade) if "data.limit" not in a]
        return ["data=folder", *kept, *data, *more]

    assert run_program("train", command("one", *ONE)) == 0
    assert run_program("train", command("other", *ONE, "data.mask=null")) == 0
    launch([command("ddp", *TWO, "trainer=ddp")], tmp_path)
    check_equal(tmp_path, "ddp", "c")
    one, other = (last_checkpoint(tmp_path / run / "default/c") for run in ("one", "other"))
    assert max_difference(one, other)[0] > 100 * TOLERANCE


@pytest.mark.parametrize("stage", "abc")
def test_two_sharded_processes_train_in_bfloat16_like_one(
    stage: str, cascade: Path, tmp_path: Path
) -> None:
    """Blocks are gathered in bfloat16, and gradients reduced in float32."""
    mixed = ["trainer.precision=bf16-mixed"]
    start = tmp_path / "start"
    assert run_program("train", arguments(stage, start, cascade, *ONE, "trainer.max_steps=1")) == 0
    assert run_program("train", arguments(stage, tmp_path / "one", cascade, *ONE, *mixed)) == 0
    launch([arguments(stage, tmp_path / "two", cascade, *TWO, "trainer=fsdp", *mixed)], tmp_path)
    first, one, two = (
        last_checkpoint(tmp_path / run / "default" / stage)["state_dict"]
        for run in ("start", "one", "two")
    )
    trained = [name for name in first if first[name].is_floating_point()]
    update = torch.cat([(one[name] - first[name]).flatten() for name in trained])
    difference = torch.cat([(two[name] - one[name]).flatten() for name in trained])
    assert difference.norm() < 0.1 * update.norm()
    losses_one, losses_two = (losses(tmp_path / run / "default" / stage) for run in ("one", "two"))
    assert losses_one.keys() == losses_two.keys()
    for key, value in losses_one.items():
        assert losses_two[key] == pytest.approx(value, rel=0.02, abs=0.01), key


@pytest.mark.parametrize("stage", "abc")
def test_the_comparison_detects_ten_missing_steps(runs: Path, stage: str) -> None:
    run = runs / "one/default" / stage
    half = load.read_checkpoint(run / f"checkpoints/step{HALF:07d}.ckpt")
    assert max_difference(half, last_checkpoint(run))[0] > 100 * TOLERANCE


def test_only_fsdp_writes_sharded_checkpoints(runs: Path) -> None:
    is_sharded = {
        name: load.find_checkpoint(runs / name / "default/b").is_dir()
        for name in ("one", "ddp", "fsdp", "fsdp_one_file")
    }
    assert is_sharded == {"one": False, "ddp": False, "fsdp": True, "fsdp_one_file": False}


def test_a_sharded_run_renders_the_same_grid_as_one_process(runs: Path) -> None:
    grids = [runs / n / f"default/b/grids/step{STEPS:07d}.png" for n in ("one", "fsdp")]
    one, sharded = (np.asarray(Image.open(grid)).astype(int) for grid in grids)
    assert np.abs(one - sharded).max() <= 2


def test_validation_codes_are_counted_over_all_processes(runs: Path) -> None:
    def dead_codes(name: str) -> list[str]:
        log = (runs / name / "default/a/metrics.csv").read_text().splitlines()
        return [line for line in log if "val/codebook_dead" in line]

    assert dead_codes("one")
    assert dead_codes("one") == dead_codes("ddp") == dead_codes("fsdp")


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


def test_a_missing_shard_is_an_error(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "alone.ckpt"
    shutil.copytree(load.find_checkpoint(runs / "fsdp/default/b"), path)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) == 2
    load.read_checkpoint(path)
    for shard in shards:
        content = shard.read_bytes()
        shard.unlink()
        with pytest.raises(ValueError, match=r"alone\.ckpt is damaged, not a checkpoint"):
            load.read_checkpoint(path)
        shard.write_bytes(content)
