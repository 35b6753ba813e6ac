"""A request for images that one of two processes receives is obeyed by both at the same step."""

import os
from pathlib import Path

import lightning as L
import pytest

from tests.conftest import NO_GRIDS, small
from tests.distributed.launch import launch
from tests.test_resume import differing
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.cli.signals import DRAW_SIGNAL

pytestmark = pytest.mark.slow


class RequestOnRankOne(L.Callback):
    """Send the signal to rank 1 in its third step."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), DRAW_SIGNAL)


def test_processes_draw_sharded_weights_at_their_next_exchange(
    cascade: Path, tmp_path: Path
) -> None:
    """If only one of them drew, it would wait for the others forever."""
    paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    two = ["trainer=fsdp", "trainer.devices=2", "trainer.accelerator=cpu"]
    more = ["callbacks.signals.every_steps=4", "callbacks.sample_grids.num_images=2"]
    request = f"+callbacks.request._target_={__name__}.{RequestOnRankOne.__name__}"
    jobs = [
        [a for a in [*small("c", tmp_path / name, 6), *paths, *two, *more] if a != NO_GRIDS]
        for name in ("with", "without")
    ]
    jobs[0].append(request)
    launch(jobs, tmp_path)
    runs = [tmp_path / name / "default/c" for name in ("with", "without")]
    grids = [sorted(load.parse_step(path) for path in run.glob("grids/*.png")) for run in runs]
    assert grids == [[0, 4, 6], [0, 6]]
    assert not differing(*(load.read_checkpoint(load.find_checkpoint(run)) for run in runs))
