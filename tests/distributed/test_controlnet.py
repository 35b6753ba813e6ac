"""A ControlNet that two processes train: like one process, and resumed bit for bit."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import run_program, small
from tests.distributed.launch import launch
from tests.distributed.test_parallel import (
    HALF,
    ONE,
    STEPS,
    TOLERANCE,
    TWO,
    check_equal,
    last_checkpoint,
    max_difference,
)
from tests.test_resume import differing
from wuerstchen_pl.checkpointing import load

pytestmark = pytest.mark.slow
FSDP, DDP = [*TWO, "trainer=fsdp"], [*TWO, "trainer=ddp"]
LEFT_OUT = ("stage.prior", "stage.text_encoder", "stage.optimizer", "validate", "data.batch")
MASK = "control_images=mask"
"""Its regions are random numbers of each row."""


@pytest.fixture(scope="module")
def runs(random_base: Path, cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder per run."""
    root = tmp_path_factory.mktemp("controlnets")

    def run(name: str, *keys: str) -> list[str]:
        kept = [a for a in small("c", root / name, STEPS) if not a.startswith(LEFT_OUT)]
        return [
            *kept, "experiment=controlnet", "name=default", MASK, "data=openmoji",
            f"init_from={random_base}", f"paths.data={cascade.parent / 'data'}", "image_size=64",
            "bucket_multiple=16", "stage.optimizer.lr=1e-2", "trainer.log_every_n_steps=1",
            f"checkpoint_every_steps={HALF}", f"validate_every_steps={STEPS}",
            "trainer.gradient_clip_val=0.1", *keys,
        ]  # fmt: skip

    half = f"checkpoints/step{HALF:07d}.ckpt"
    from_ddp, from_fsdp = (f"ckpt={root / name}/default/c/{half}" for name in ("ddp", "fsdp"))
    launch(
        [
            run("ddp", *DDP),
            run("ddp_resumed", *DDP, from_ddp),
            run("fsdp", *FSDP),
            run("fsdp_resumed", *FSDP, from_fsdp),
            run("checkpointed", *FSDP, "activation_checkpointing=true"),
        ],
        root,
    )
    assert run_program("train", run("one", *ONE)) == 0
    assert run_program("train", run("fsdp_then_one", *ONE, from_fsdp)) == 0
    return root


@pytest.mark.parametrize("name", ["ddp", "fsdp", "checkpointed"])
def test_two_processes_train_a_controlnet_like_one(runs: Path, name: str) -> None:
    check_equal(runs, name, "c", "one")


def test_the_comparison_detects_ten_missing_steps(runs: Path) -> None:
    run = runs / "one/default/c"
    half = load.read_checkpoint(run / f"checkpoints/step{HALF:07d}.ckpt")
    assert max_difference(half, last_checkpoint(run))[0] > 1000 * TOLERANCE


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_run_resumes_bit_for_bit_on_two_processes(runs: Path, strategy: str) -> None:
    whole, resumed = (
        last_checkpoint(runs / n / "default/c") for n in (strategy, f"{strategy}_resumed")
    )
    assert whole["global_step"] == resumed["global_step"] == STEPS
    assert not differing(whole, resumed)


def test_a_sharded_run_resumes_without_sharding(runs: Path) -> None:
    one, resumed = (last_checkpoint(runs / run / "default/c") for run in ("one", "fsdp_then_one"))
    assert one["global_step"] == resumed["global_step"] == STEPS
    assert max_difference(one, resumed)[0] < TOLERANCE, max_difference(one, resumed)


def test_a_sharded_checkpoint_has_the_controlnet_only(runs: Path) -> None:
    path = load.find_checkpoint(runs / "fsdp/default/c")
    names = {
        name
        for file in path.glob("*.safetensors")
        for name in load_file(file)
        if not name.startswith("optimizer")
    }
    assert all("controlnet." in name for name in names)
