"""Atomic writes and detection of damaged files."""

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.io import atomic


def commit_checkpoint(folder: Path, step: int, content: bytes) -> Path:
    path = folder / f"checkpoints/step{step:07d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_bytes(content)
    atomic.commit(temporary, path)
    return path


def test_the_sidecar_is_readable_by_sha256sum(tmp_path: Path) -> None:
    path = commit_checkpoint(tmp_path, 1, b"weights")
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]
    command = ["sha256sum", "--check", f"{path.name}.sha256"]
    subprocess.run(command, cwd=path.parent, capture_output=True, check=True)
    assert atomic.is_intact(path)
    path.write_bytes(b"weighty")
    assert not atomic.is_intact(path)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one_with_a_warning(tmp_path: Path) -> None:
    first, second, third = (
        commit_checkpoint(tmp_path, step, b"%d" % step * 100) for step in (9, 10, 100)
    )
    assert load.find_checkpoint(tmp_path) == third
    third.write_bytes(third.read_bytes()[:-1])
    with pytest.warns(
        UserWarning, match=r"step0000100\.ckpt is damaged; using the checkpoint before"
    ):
        assert load.find_checkpoint(tmp_path) == second
    with pytest.raises(ValueError, match=r"step0000100\.ckpt is damaged: its sha256 differs from"):
        load.find_checkpoint(third)
    for path in (first, second):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match=r"every checkpoint of .* is damaged"),
    ):
        load.find_checkpoint(tmp_path)


def test_a_checkpoint_without_a_sidecar_is_accepted(tmp_path: Path) -> None:
    path = commit_checkpoint(tmp_path, 1, b"from elsewhere")
    path.with_name(f"{path.name}.sha256").unlink()
    path.write_bytes(b"changed")
    assert load.find_checkpoint(tmp_path) == path


@pytest.mark.parametrize(
    ("name", "at", "newest"),
    [
        ("fsync", 0, b"before"),
        ("fsync", 1, b"before"),
        ("replace", 0, b"before"),
        ("replace", 1, b"before"),
        ("fsync", 2, b"after"),  # only the sync of the folder entry fails
    ],
)
def test_a_full_disk_at_any_point_leaves_an_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, at: int, newest: bytes
) -> None:
    commit_checkpoint(tmp_path, 1, b"before")
    calls, real = [], getattr(os, name)

    def fails(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(os, name, fails)
    with pytest.raises(OSError, match="No space left"):
        commit_checkpoint(tmp_path, 2, b"after")
    monkeypatch.undo()
    assert load.find_checkpoint(tmp_path).read_bytes() == newest


def test_the_sidecar_is_removed_with_the_file(tmp_path: Path) -> None:
    path = commit_checkpoint(tmp_path, 1, b"old")
    atomic.remove(path)
    assert list(path.parent.iterdir()) == []


CALLS = {"fsync": 4, "replace": 3, "unlink": 2}
"""How often an overwrite calls a function at most."""


@pytest.mark.parametrize(("name", "call"), [(n, i) for n in CALLS for i in range(CALLS[n] + 1)])
@pytest.mark.parametrize("has_sidecar", [True, False])
def test_a_kill_at_any_point_of_an_overwrite_leaves_an_intact_file(
    tmp_path: Path, name: str, call: int, has_sidecar: bool
) -> None:
    """The file is the old or the new one, and always matches its sidecar."""
    path = commit_checkpoint(tmp_path, 1, b"before")
    if not has_sidecar:
        for sidecar in path.parent.glob("*.sha256"):
            sidecar.unlink()
    if (child := os.fork()) == 0:
        calls, real = [], getattr(os, name)

        def dies(*arguments: object, **options: object) -> None:
            calls.append(arguments)
            if len(calls) == call + 1:
                os._exit(9)
            real(*arguments, **options)

        setattr(os, name, dies)
        commit_checkpoint(tmp_path, 1, b"after")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in ((0, 9) if call < CALLS[name] else (0,))
    assert atomic.is_intact(path)
    assert path.read_bytes() in ((b"before", b"after") if status else (b"after",))


@pytest.mark.parametrize("write", [atomic.atomic_write, atomic.atomic_folder])
def test_an_error_leaves_nothing_behind_and_names_the_path(write: Any, tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"

    def write_half() -> None:
        with write(target) as temporary:
            (temporary / "x" if temporary.is_dir() else temporary).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"new/target could not be written: No space left"):
        write_half()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not target.exists()
