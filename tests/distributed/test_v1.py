"""Version 1's Stage B on two processes trains like on one."""

from pathlib import Path

import pytest

from tests.conftest import NO_GRIDS, run_program
from tests.distributed.launch import launch
from tests.distributed.test_parallel import ONE, TOLERANCE, TWO, last_checkpoint, max_difference
from tests.test_v1 import token_stage

pytestmark = pytest.mark.slow
STEPS = 10
STRATEGIES = {"ddp": ["trainer=ddp"], "fsdp": ["trainer=fsdp"]}


def arguments(root: Path, cascade: Path, *more: str) -> list[str]:
    dropped = ("validate", "data.batch", NO_GRIDS)
    kept = [a for a in token_stage(root, cascade, steps=STEPS) if not a.startswith(dropped)]
    return [
        *kept, f"paths.data={cascade.parent / 'data'}", NO_GRIDS, f"validate_every_steps={STEPS}",
        "trainer.gradient_clip_val=0.1", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cascade: Path) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    assert run_program("train", arguments(root / "one", cascade, *ONE)) == 0
    launch([arguments(root / n, cascade, *TWO, *keys) for n, keys in STRATEGIES.items()], root)
    return root


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_equal_one(name: str, runs: Path) -> None:
    one, two = (last_checkpoint(runs / which / "default/b") for which in ("one", name))
    difference, where = max_difference(one, two)
    assert difference < TOLERANCE, where
