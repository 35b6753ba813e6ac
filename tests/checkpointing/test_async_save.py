"""Checkpoints that are written while training goes on."""

import errno
import threading
from pathlib import Path

import pytest
import torch

from tests.test_resume import STEPS, differing, train
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.async_save import DeferredSave
from wuerstchen_pl.io import atomic
from wuerstchen_pl.stages.stage import Stage

ASYNC_SAVE = "callbacks.checkpoints.async_save=true"
KEPT = f"callbacks.checkpoints.keep={STEPS}"


def test_training_goes_on_and_the_checkpoint_is_of_its_own_step(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written only once two further steps are begun, and is as if at once."""
    begun, write, start = threading.Condition(), DeferredSave.write, Stage.on_train_batch_start
    steps: list[int] = []

    def note(self: Stage, batch: dict, batch_idx: int) -> None:
        with begun:
            steps.append(self.global_step)
            begun.notify_all()
        start(self, batch, batch_idx)

    def late(self: DeferredSave, group: None) -> None:
        wanted = len(steps) + 2
        with begun:
            if wanted <= STEPS:
                assert begun.wait_for(lambda: len(steps) >= wanted, timeout=30)
        write(self, group)

    train("c", tmp_path / "now", cascade, KEPT)
    monkeypatch.setattr(Stage, "on_train_batch_start", note)
    monkeypatch.setattr(DeferredSave, "write", late)
    train("c", tmp_path / "late", cascade, KEPT, ASYNC_SAVE, "checkpoint_every_steps=3")
    for step in (3, 6, STEPS):
        now, then = (
            load.read_checkpoint(tmp_path / f"{when}/default/c/checkpoints/step{step:07d}.ckpt")
            for when in ("now", "late")
        )
        assert now["global_step"] == then["global_step"] == step
        assert not differing(now, then)


def test_a_disk_that_fills_up_meanwhile_ends_the_run_and_costs_no_checkpoint(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    publish = atomic.commit

    def full(temporary: Path, path: Path) -> None:
        if load.parse_step(path) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(temporary, path)

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "commit", full)
        with pytest.raises(AssertionError):  # of the exit code
            train("c", tmp_path / "full", cascade, ASYNC_SAVE)
    said = capsys.readouterr().err
    assert "step0000004.ckpt could not be written: No space left on device" in said
    folder = tmp_path / "full/default/c/checkpoints"
    assert [p.name for p in sorted(folder.glob("*.ckpt"))][-1] == "step0000003.ckpt"
    assert not list(folder.glob("*.partial"))
    whole = train("c", tmp_path / "whole", cascade)
    assert not differing(whole, train("c", tmp_path / "full", cascade, ASYNC_SAVE, "ckpt=auto"))


def test_what_is_put_off_is_a_copy_or_the_thing_itself() -> None:
    for copied, wanted in ((True, 1.0), (False, 2.0)):
        tensor, written = torch.ones(2), []
        put_off = DeferredSave(copy_to_host=copied)
        put_off.record(lambda content, group, to=written: to.append(content), {"a": [tensor, "b"]})
        tensor.fill_(2)
        put_off.write(None)
        assert written[0]["a"][0].tolist() == [wanted, wanted]
        assert written[0]["a"][1] == "b"
