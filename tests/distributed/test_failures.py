"""A process that fails ends the others, and one that works alone for long does not."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import small
from tests.distributed.failing import MESSAGE
from tests.distributed.launch import launch

pytestmark = pytest.mark.slow

WAITING = """
import datetime, sys, time
import torch.distributed as dist
from wuerstchen_pl.distributed.waiting import patient_barrier

dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
if dist.get_rank() == 0:
    time.sleep(6)
patient_barrier() if sys.argv[1] == "patient" else dist.barrier()
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_end_with_the_reason_when_one_fails(
    strategy: str, cascade: Path, tmp_path: Path
) -> None:
    two = [f"trainer={strategy}", "trainer.devices=2", "trainer.accelerator=cpu"]
    failing = "+callbacks.fail._target_=tests.distributed.failing.FailOnRankOne"
    stage_paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    start = time.monotonic()
    with pytest.raises(AssertionError, match=f"error: {MESSAGE}"):
        launch([[*small("c", tmp_path), *stage_paths, *two, failing]], tmp_path)
    assert time.monotonic() - start < 60


def test_bad_data_of_one_process_end_all_with_the_same_reason(
    cascade: Path, tmp_path: Path
) -> None:
    """A quarter of all samples is unreadable, all of them on rank 1."""
    two = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
    reading = ["data.num_workers=0", "data.keep_decoded=false"]  # in this process, at each epoch
    target = "tests.distributed.failing.UnreadableOnRankOne"
    failing = [f"+callbacks.fail._target_={target}", f"+callbacks.fail.folder={tmp_path}"]
    stage_paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    job = [*small("c", tmp_path, steps=300), *stage_paths, *two, *reading, *failing]
    with pytest.raises(AssertionError) as failure:
        launch([job], tmp_path)
    ended, files = time.time(), [tmp_path / f"error-{rank}" for rank in range(2)]
    reason, other = (file.read_text() for file in files)
    assert other == reason
    assert f"error: {reason}" in str(failure.value)
    assert ended - min(file.stat().st_mtime for file in files) < 60
    bad, total = map(int, re.findall(r"\d+", reason)[:2])
    assert 0.2 < bad / total < 0.3


@pytest.mark.parametrize(("barrier", "waits"), [("patient", True), ("default", False)])
def test_others_wait_for_a_process_that_works_alone(
    barrier: str, waits: bool, tmp_path: Path
) -> None:
    """For longer than the default group's timeout, which is two seconds here."""
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, str(script), barrier]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode == 0) == waits, done.stderr[-2000:]
