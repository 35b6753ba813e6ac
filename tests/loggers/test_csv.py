"""The CSV log of a resumed run."""

import csv
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
