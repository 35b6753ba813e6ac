"""Two programs do not write to one folder at the same time."""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wuerstchen_pl.io.folder_lock import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from wuerstchen_pl.io.folder_lock import locked
with locked(Path(sys.argv[1]), key="out"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_owner_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    with locked(tmp_path, key="out"):
        owner = json.loads((tmp_path / LOCK).read_text())
        assert owner["process"] == os.getpid()
        message = rf"out={tmp_path} is in use by process {os.getpid()} on {owner['host']} since"
        with pytest.raises(BlockingIOError, match=message), locked(tmp_path, key="out"):
            pass
        assert json.loads((tmp_path / LOCK).read_text()) == owner
    assert not list(tmp_path.iterdir())
    with locked(tmp_path, key="out"):
        pass


def test_the_lock_of_a_killed_owner_is_free(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError, match=f"process {other.pid}"):
            locked(tmp_path, key="out").__enter__()
        other.send_signal(signal.SIGKILL)
        other.wait()
        with locked(tmp_path, key="out"):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_a_worker_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    done = fork.Event()
    with locked(tmp_path, key="out"):
        worker = fork.Process(target=done.wait)
        worker.start()
    try:
        with locked(tmp_path, key="out"):
            assert worker.is_alive()
    finally:
        done.set()
        worker.join()


def test_only_one_of_many_gets_the_lock(tmp_path: Path) -> None:
    """Also while owners remove the file: each round starts with 8 threads at once."""
    for _ in range(30):
        inside, most, barrier = [0], [0], threading.Barrier(8)

        def enter(inside: list[int], most: list[int], barrier: threading.Barrier) -> None:
            barrier.wait()
            try:
                with locked(tmp_path, key="out"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except BlockingIOError:
                pass

        threads = [threading.Thread(target=enter, args=(inside, most, barrier)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == 1


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path, key="out"):
        assert "cannot be locked" in caplog.text
