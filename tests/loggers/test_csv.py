"""The CSV log of a resumed run."""

import csv
import os
from pathlib import Path

import pytest

from wuerstchen_pl.loggers.csv import CSVLogger


@pytest.mark.parametrize(
    "damage", ["", "\n", "\n\n", "3,train/lo", "3", ",,", "\0\0", "x,y,z\n", "\udcff,1,2\n"]
)
def test_a_resumed_run_keeps_the_rows_before_its_step_despite_a_damaged_last_line(
    damage: str, tmp_path: Path
) -> None:
    before = CSVLogger(folder=str(tmp_path))
    for step in range(4):
        before.log_metrics({"train/loss": step / 10}, step)
    with before.path.open("ab") as file:
        file.write(damage.encode("utf-8", "surrogateescape"))
    after = CSVLogger(folder=str(tmp_path))
    after.log_metrics({"train/loss": 9.0}, 2)
    with after.path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["step", "metric", "value"],
        ["0", "train/loss", "0"],
        ["1", "train/loss", "0.1"],
        ["2", "train/loss", "9"],
    ]


def test_rows_are_appended_by_one_system_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a killed process leaves whole lines, even if they exceed the buffer of a file."""
    log = CSVLogger(folder=str(tmp_path))
    log.log_metrics({"a": 1.0}, 0)
    sizes, write = [], os.write
    monkeypatch.setattr(os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data))
    log.log_metrics({f"metric {i}": float(i) for i in range(10_000)}, 1)
    monkeypatch.undo()
    lines = log.path.read_text().splitlines()
    assert lines == ["step,metric,value", "0,a,1", *(f"1,metric {i},{i}" for i in range(10_000))]
    assert sizes == [sum(len(line) + 1 for line in lines[2:])]


def test_a_kill_while_a_resumed_run_drops_rows_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = CSVLogger(folder=str(tmp_path))
    before.log_metrics({"a": 1.0}, 0)
    content = before.path.read_bytes()

    def killed(source: str, target: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        CSVLogger(folder=str(tmp_path)).log_metrics({"a": 2.0}, 1)
    assert before.path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [before.path]
