"""scripts/fault_injection.py: killed runs and disk faults lose nothing."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import fault_injection


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "times"), [(1, 4), (2, 2)])
def test_a_killed_run_ends_bit_equal(processes: int, times: int, tmp_path: Path) -> None:
    assert fault_injection.kills(tmp_path, times=times, steps=40, processes=processes, seed=1) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"), [("full-disk", "No space left"), ("read-only", "Read-only file system")]
)
def test_a_disk_fault_loses_no_checkpoint(kind: str, reason: str) -> None:
    unshare = ["unshare", "--map-root-user", "--mount", "true"]
    if shutil.which("unshare") is None or subprocess.run(unshare, capture_output=True).returncode:
        pytest.skip("needs permission to mount in a user namespace")
    command = [sys.executable, "-m", "scripts.fault_injection", kind, "--steps", "30"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    assert f"could not be written: {reason}" in process.stdout
    assert "bit-equal" in process.stdout


def test_the_comparison_detects_a_single_bit() -> None:
    one = {key: {"a": torch.tensor([1.0, 2.0])} for key in fault_injection.COMPARED}
    other = {key: {"a": torch.tensor([1.0, 2.0])} for key in fault_injection.COMPARED}
    assert fault_injection.differing(one, other) == []
    bits = other["ema"]["a"].view(torch.int32)
    bits[random.Random(0).randrange(2)] ^= 1
    assert fault_injection.differing(one, other) == ["ema.a"]
