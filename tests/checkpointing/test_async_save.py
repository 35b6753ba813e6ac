"""Checkpoints that are written while training continues."""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_resume import STEPS, differing, train
from wuerstchen_pl.callbacks.checkpoints import Checkpoints
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.async_save import DeferredSave
from wuerstchen_pl.io import atomic
from wuerstchen_pl.stages.stage import Stage

ASYNC_SAVE = "callbacks.checkpoints.async_save=true"
KEEP_ALL = f"callbacks.checkpoints.keep={STEPS}"


@pytest.mark.slow
def test_training_continues_while_the_checkpoint_of_an_earlier_step_is_written(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written after two more steps have started, and equals a synchronous one."""
    started, write, start = threading.Condition(), DeferredSave.write, Stage.on_train_batch_start
    steps: list[int] = []

    def recording_start(self: Stage, batch: dict, batch_idx: int) -> None:
        with started:
            steps.append(self.global_step)
            started.notify_all()
        start(self, batch, batch_idx)

    def delayed_write(self: DeferredSave, group: None) -> None:
        expected = len(steps) + 2
        with started:
            if expected <= STEPS:
                assert started.wait_for(lambda: len(steps) >= expected, timeout=30)
        write(self, group)

    train("c", tmp_path / "sync", cascade, KEEP_ALL)
    monkeypatch.setattr(Stage, "on_train_batch_start", recording_start)
    monkeypatch.setattr(DeferredSave, "write", delayed_write)
    train("c", tmp_path / "async", cascade, KEEP_ALL, ASYNC_SAVE, "checkpoint_every_steps=3")
    for step in (3, 6, STEPS):
        sync, deferred = (
            load.read_checkpoint(tmp_path / f"{mode}/default/c/checkpoints/step{step:07d}.ckpt")
            for mode in ("sync", "async")
        )
        assert sync["global_step"] == deferred["global_step"] == step
        assert not differing(sync, deferred)


@pytest.mark.slow
def test_a_full_disk_during_an_async_save_ends_the_run_and_keeps_older_checkpoints(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    commit = atomic.commit

    def failing_commit(temporary: Path, path: Path) -> None:
        if load.parse_step(path) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(temporary, path)

    with monkeypatch.context() as patched:
        patched.setattr(atomic, "commit", failing_commit)
        with pytest.raises(AssertionError):  # of the exit code
            train("c", tmp_path / "full", cascade, ASYNC_SAVE)
    stderr = capsys.readouterr().err
    assert "step0000004.ckpt could not be written: No space left on device" in stderr
    folder = tmp_path / "full/default/c/checkpoints"
    assert [p.name for p in sorted(folder.glob("*.ckpt"))][-1] == "step0000003.ckpt"
    assert not list(folder.glob("*.partial"))
    uninterrupted = train("c", tmp_path / "whole", cascade)
    resumed = train("c", tmp_path / "full", cascade, ASYNC_SAVE, "ckpt=auto")
    assert not differing(uninterrupted, resumed)


def test_the_writing_thread_uses_the_device_of_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current device is a setting of each thread, and device 0 in a new one."""
    current = threading.local()

    @contextmanager
    def device_index(index: int | None) -> Iterator[None]:
        current.device = index
        yield
        del current.device

    def save(path: Path, storage_options: DeferredSave) -> None:
        def write(content: dict, group: None) -> None:
            path.write_text(f"cuda:{getattr(current, 'device', 0)}")

        storage_options.record(write, {})

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    trainer: Any = SimpleNamespace(
        global_step=1,
        is_global_zero=True,
        save_checkpoint=save,
        strategy=SimpleNamespace(root_device=torch.device("cuda", 3)),
    )
    checkpoints = Checkpoints(folder=str(tmp_path), every_steps=1, async_save=True)
    checkpoints.save(trainer)
    checkpoints.finish()
    assert (tmp_path / "step0000001.ckpt").read_text() == "cuda:3"


def test_a_deferred_save_writes_a_copy_or_the_tensors_themselves() -> None:
    for copy, expected in ((True, 1.0), (False, 2.0)):
        tensor, written = torch.ones(2), []
        deferred = DeferredSave(copy_to_host=copy)
        deferred.record(lambda content, group, to=written: to.append(content), {"a": [tensor, "b"]})
        tensor.fill_(2)
        deferred.write(None)
        assert written[0]["a"][0].tolist() == [expected, expected]
        assert written[0]["a"][1] == "b"
