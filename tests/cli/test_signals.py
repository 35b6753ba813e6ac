"""Signals that reach a program before or after training, or one that does not train."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest

from tests.conftest import small
from wuerstchen_pl.cli.signals import (
    DRAW_SIGNAL,
    INTERRUPTED,
    REQUEUE,
    TERMINATED,
    Exit,
    StopSignals,
)
from wuerstchen_pl.stages.stage import Stage

Program = Any


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, even if a shell started the tests in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


def sender(signum: int) -> Callable[..., None]:
    return lambda *args, **kwargs: send(signum)


@pytest.mark.parametrize(
    ("signum", "code", "said"),
    [(signal.SIGINT, INTERRUPTED, ""), (signal.SIGTERM, TERMINATED, "stopped by SIGTERM\n")],
)
def test_a_signal_ends_a_working_program_with_one_line_at_most(
    signum: int, code: int, said: str, program: Program, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("wuerstchen_pl.programs.sample.run", sender(signum))
    assert program("sample", "prompt=frog") == code
    assert capsys.readouterr().err == said
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("SIGTERM", "prepare_data"),
        pytest.param("SIGINT", "setup", marks=pytest.mark.slow),
        ("SIGTERM", "on_fit_end"),
        pytest.param("SIGINT", "prepare_data", marks=pytest.mark.slow),
        pytest.param("SIGTERM", "setup", marks=pytest.mark.slow),
        pytest.param("SIGINT", "on_fit_end", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_outside_its_steps_can_be_requeued(
    name: str, hook: str, program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    arguments = [*small("a", tmp_path, steps=1), "ckpt=auto"]
    with monkeypatch.context() as patch:
        patch.setattr(Stage, hook, sender(signal.Signals[name]))
        assert program("train", *arguments) == (REQUEUE if name == "SIGTERM" else INTERRUPTED)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "ckpt=auto" in said
    assert program("train", *arguments) == 0


def test_a_stop_also_reaches_the_processes_that_lightning_started(
    program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launcher = Mock()

    def starting(trainer: L.Trainer, *args: object, **kwargs: object) -> None:
        trainer.strategy._launcher = launcher
        send(signal.SIGTERM)

    monkeypatch.setattr(L.Trainer, "fit", starting)
    assert program("train", *small("a", tmp_path)) == REQUEUE
    launcher.kill.assert_called_once_with(signal.SIGTERM)


def test_a_requested_traceback_does_not_change_the_exit_code(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("wuerstchen_pl.programs.train.run", sender(signal.SIGTERM))
    assert program("train", "stage=a") == REQUEUE


def test_a_forked_worker_dies_silently(capfd: pytest.CaptureFixture) -> None:
    with StopSignals() as signals:
        signals.begin_work()
        if (worker := os.fork()) == 0:
            send(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(worker, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signals.begin_work()
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_usr1_stops_only_a_program_that_can_resume() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals():
        assert signal.getsignal(signal.SIGUSR1) == before
    with StopSignals(resumable=True) as signals:
        signals.begin_work()
        with pytest.raises(Exit) as stop:
            send(signal.SIGUSR1)
        assert stop.value.code == REQUEUE
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_request_for_images_is_ignored_before_the_first_step() -> None:
    before = signal.getsignal(DRAW_SIGNAL)
    with StopSignals(resumable=True) as signals:
        send(DRAW_SIGNAL)
        signals.begin_work()
        send(DRAW_SIGNAL)
    assert signal.getsignal(DRAW_SIGNAL) == before
