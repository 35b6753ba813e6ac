"""Synchronizations of a training step are attributed to lines of this package."""

import warnings
from collections import Counter

import pytest
import torch

from scripts.gpu_check.syncs import MESSAGE, SyncRecorder, record_syncs, sync_row
from tests.stages.conftest import STAGES, fit
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.stages import c
from wuerstchen_pl.stages.stage import Stage


def synchronize() -> None:
    """Warn as torch does of an operation that waits for the GPU."""
    warnings.warn(f"{MESSAGE} (Triggered internally)", stacklevel=1)


def test_each_wait_counts_and_other_warnings_are_shown() -> None:
    with warnings.catch_warnings(record=True) as shown, record_syncs() as lines:
        warnings.simplefilter("always")
        for _ in range(2):
            synchronize()
        warnings.warn("another", stacklevel=1)
    assert list(lines.values()) == [2]
    assert [str(warning.message) for warning in shown] == ["another"]


def waiting_stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A Stage C that waits once for the GPU in each training step, in its own code."""
    weight = c.StageC.loss.__globals__["p2_weight"]

    def waiting(*args: object) -> object:
        synchronize()
        return weight(*args)

    monkeypatch.setitem(c.StageC.loss.__globals__, "p2_weight", waiting)
    return STAGES["c"]()


def test_one_step_is_recorded_with_the_line_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    batch: Batch = {"image": torch.rand(4, 3, 32, 32), "caption": ["a"] * 4, "key": list("abcd")}
    recorder = SyncRecorder(step=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=MESSAGE)  # in the other steps
        fit(waiting_stage(monkeypatch), batch, 4, callbacks=[recorder])
    assert recorder.lines is not None
    (line,) = recorder.lines
    assert recorder.lines[line] == 1
    assert line.startswith("stages/text_conditional.py:")
    assert "p2_weight" in line


def test_the_row_is_missed_by_a_wait_and_by_a_step_that_never_came() -> None:
    assert sync_row("a", Counter()).verdict == "ok"
    assert sync_row("a", Counter({"stages/c.py:1 x": 2})).measured == "2 x stages/c.py:1 x"
    assert sync_row("a", Counter({"stages/c.py:1 x": 2})).verdict == "MISSED"
    assert sync_row("a", None).verdict == "MISSED"
