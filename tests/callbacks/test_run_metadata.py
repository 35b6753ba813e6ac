"""The record of a run."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from wuerstchen_pl.callbacks.run_metadata import RunMetadata
from wuerstchen_pl.stages.c import StageC


def finish(folder: Path, step: int) -> None:
    trainer: Any = SimpleNamespace(
        is_global_zero=True, global_step=step, num_devices=2, num_nodes=3
    )
    network = nn.Linear(3, 4)
    network.bias.requires_grad_(False)
    stage: Any = SimpleNamespace(name=StageC.name, parameters=network.parameters)
    RunMetadata(folder=str(folder)).on_fit_end(trainer, stage)


def test_a_run_is_recorded_with_its_stage_and_size(tmp_path: Path) -> None:
    finish(tmp_path / "run", 7)
    record = json.loads((tmp_path / "run/run.json").read_text())
    expected = {"stage": "c", "steps": 7, "devices": 6, "parameters": 16, "trained_parameters": 12}
    assert {key: record[key] for key in expected} == expected


def test_a_failed_write_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(tmp_path, 7)

    def failing(source: str, target: str) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match=r"run\.json could not be written: disk full"):
        finish(tmp_path, 8)
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
