"""A student that two processes train: like one process, and resumed bit for bit."""

from pathlib import Path

import pytest

from tests.conftest import run_program, small
from tests.distributed.launch import launch
from tests.distributed.test_parallel import HALF, ONE, STEPS, TWO, check_equal, last_checkpoint
from tests.test_resume import differing

pytestmark = pytest.mark.slow
FSDP, DDP = [*TWO, "trainer=fsdp"], [*TWO, "trainer=ddp"]
LEFT_OUT = ("stage.prior", "stage.text_encoder", "stage.optimizer", "validate", "data.batch")


@pytest.fixture(scope="module")
def runs(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder per run."""
    root = tmp_path_factory.mktemp("students")

    def run(name: str, *keys: str) -> list[str]:
        kept = [a for a in small("c", root / name, STEPS) if not a.startswith(LEFT_OUT)]
        return [
            *kept, "experiment=distill", "name=default", "data=openmoji", "cache=false",
            f"init_from={cascade / 'c'}", "stage.teacher_steps=3", "image_size=64",
            "bucket_multiple=16", "stage.optimizer.lr=1e-4", "trainer.log_every_n_steps=1",
            f"checkpoint_every_steps={HALF}", f"validate_every_steps={STEPS}",
            "trainer.gradient_clip_val=0.1", *keys,
        ]  # fmt: skip

    half = f"checkpoints/step{HALF:07d}.ckpt"
    launch(
        [
            run("ddp", *DDP),
            run("fsdp", *FSDP),
            run("fsdp_resumed", *FSDP, f"ckpt={root / 'fsdp'}/default/c/{half}"),
        ],
        root,
    )
    assert run_program("train", run("one", *ONE)) == 0
    return root


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_train_a_student_like_one(runs: Path, name: str) -> None:
    check_equal(runs, name, "c", "one")


def test_a_run_resumes_bit_for_bit_on_two_processes(runs: Path) -> None:
    whole, resumed = (last_checkpoint(runs / n / "default/c") for n in ("fsdp", "fsdp_resumed"))
    assert whole["global_step"] == resumed["global_step"] == STEPS
    assert not differing(whole, resumed)
