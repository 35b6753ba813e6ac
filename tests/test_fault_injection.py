"""scripts/fault_injection: killed runs and disk faults lose nothing."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.fault_injection.ends import ends
from scripts.fault_injection.kills import kills
from scripts.fault_injection.runs import COMPARED, differing
from scripts.fault_injection.startup import startup

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "times"), [(1, 4), (2, 2)])
def test_a_killed_run_ends_bit_equal(processes: int, times: int, tmp_path: Path) -> None:
    assert kills(tmp_path, times=times, steps=40, processes=processes, seed=1) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"), [("full-disk", "No space left"), ("read-only", "Read-only file system")]
)
def test_a_disk_fault_loses_no_checkpoint(kind: str, reason: str) -> None:
    unshare = ["unshare", "--map-root-user", "--mount", "true"]
    if shutil.which("unshare") is None or subprocess.run(unshare, capture_output=True).returncode:
        pytest.skip("needs permission to mount in a user namespace")
    command = [sys.executable, "-m", "scripts.fault_injection", kind, "--steps", "30"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"could not be written: {reason}" in process.stdout
    assert "bit-equal" in process.stdout


@pytest.mark.slow
def test_every_end_leaves_a_checkpoint_that_goes_on_bit_equal(tmp_path: Path) -> None:
    assert ends(tmp_path, steps=90) == []


@pytest.mark.slow
def test_a_run_that_was_stopped_while_it_started_runs_again(tmp_path: Path) -> None:
    assert startup(tmp_path, times=2, steps=4, seed=0) == []


def test_the_comparison_detects_a_single_bit() -> None:
    one = {key: {"a": torch.tensor([1.0, 2.0])} for key in COMPARED}
    other = {key: {"a": torch.tensor([1.0, 2.0])} for key in COMPARED}
    assert differing(one, other) == []
    bits = other["ema"]["a"].view(torch.int32)
    bits[random.Random(0).randrange(2)] ^= 1
    assert differing(one, other) == ["ema.a"]
