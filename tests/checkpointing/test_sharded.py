"""Sharded checkpoints: round trips, detection of damage, and safety with untrusted files."""

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from wuerstchen_pl.checkpointing import load, sharded
from wuerstchen_pl.io import atomic

CONTENT = {
    "stage": {"_target_": "wuerstchen_pl.stages.a.StageA", "seed": 0},
    "state_dict": {"net.0.weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)},
    "ema": {"num_steps": 2, "num_updates": 2, "shadow": {"net.0.weight": torch.ones(2, 3)}},
    "frozen": {},
    "optimizer_states": [
        {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]}
    ],
    "loops": {"betas": (0.9, 0.99), "none": None},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A sharded checkpoint in a run's folder."""
    path = tmp_path / "checkpoints/step0000002.ckpt"
    path.parent.mkdir()
    sharded.write_sharded(CONTENT, path.with_suffix(".partial"))
    atomic.commit(path.with_suffix(".partial"), path)
    return path


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        items: Any = other
        return type(one) is type(other) and all(map(same, one, items))
    return one == other


def test_nested_tensors_and_values_are_read_back(saved: Path) -> None:
    assert same(load.read_checkpoint(load.find_checkpoint(saved.parent.parent)), CONTENT)
    assert same(load.read_checkpoint(load.find_checkpoint(saved)), CONTENT)


def test_a_damaged_shard_is_detected(saved: Path) -> None:
    shard = next(saved.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"step0000002\.ckpt is damaged"):
        load.find_checkpoint(saved)


@pytest.mark.parametrize("name", ["rest.pt", "*.safetensors"])
def test_a_missing_file_is_detected(saved: Path, name: str) -> None:
    next(saved.glob(name)).unlink()
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="every ch"):
        load.find_checkpoint(saved.parent.parent)
    saved.with_name(f"{saved.name}.sha256").unlink()  # also detected without hashes
    with pytest.raises((ValueError, FileNotFoundError)):
        load.read_checkpoint(load.find_checkpoint(saved))


def test_files_of_an_earlier_attempt_are_removed(saved: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (temporary / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"of another run")
    sharded.write_sharded(CONTENT, temporary)
    assert same(sharded.read_sharded(temporary), CONTENT)


def test_a_new_checkpoint_replaces_a_damaged_one(saved: Path) -> None:
    (saved / "rest.pt").write_bytes(b"")
    sharded.write_sharded(CONTENT, saved.with_suffix(".partial"))
    atomic.commit(saved.with_suffix(".partial"), saved)
    assert same(load.read_checkpoint(load.find_checkpoint(saved)), CONTENT)


def test_a_pickle_in_an_untrusted_checkpoint_is_not_run(saved: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    saved.with_name(f"{saved.name}.sha256").unlink()
    (saved / ".metadata").write_bytes(pickle.dumps(Payload()))  # the pickle of torch's own format
    load.read_checkpoint(saved)
    (saved / "rest.pt").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="it was not loaded"):
        load.read_checkpoint(saved)
    assert not (tmp_path / "ran").exists()


def test_hashes_can_be_checked_with_sha256sum(saved: Path) -> None:
    command = ["sha256sum", "--check", "--quiet", f"{saved.name}.sha256"]
    subprocess.run(command, cwd=saved.parent, capture_output=True, check=True)
    assert atomic.is_intact(saved)
    (saved / "one.more").write_bytes(b"")
    assert not atomic.is_intact(saved)
