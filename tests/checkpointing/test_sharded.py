"""Checkpoints that are folders: whole trees come back, damage is seen, no code runs."""

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from wuerstchen_pl.checkpointing import load, sharded
from wuerstchen_pl.io import atomic

CONTENT = {
    "stage": {"_target_": "wuerstchen_pl.stages.a.StageA", "seed": 0},
    "state_dict": {"net.0.weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)},
    "ema": {"num_steps": 2, "shadow": {"net.0.weight": torch.ones(2, 3)}},
    "frozen": {},
    "optimizer_states": [
        {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]}
    ],
    "loops": {"betas": (0.9, 0.99), "none": None},
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint in parts."""
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
        return type(one) is type(other) and all(map(same, one, other))  # type: ignore[call-overload]
    return one == other


def test_a_tree_of_tensors_and_values_comes_back(saved: Path) -> None:
    assert same(load.read_checkpoint(load.find_checkpoint(saved.parent.parent)), CONTENT)
    assert same(load.read_checkpoint(load.find_checkpoint(saved)), CONTENT)


def test_a_damaged_part_is_seen(saved: Path) -> None:
    part = next(saved.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"step0000002\.ckpt is damaged"):
        load.find_checkpoint(saved)


@pytest.mark.parametrize("name", ["rest.pt", "*.safetensors"])
def test_a_missing_part_is_seen(saved: Path, name: str) -> None:
    next(saved.glob(name)).unlink()
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="all 1 ch"):
        load.find_checkpoint(saved.parent.parent)
    saved.with_name(f"{saved.name}.sha256").unlink()  # and of one from elsewhere
    with pytest.raises((ValueError, FileNotFoundError)):
        load.read_checkpoint(load.find_checkpoint(saved))


def test_what_an_earlier_attempt_left_is_no_part_of_it(saved: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    (temporary / "shard-00009-model-00001-of-00001.safetensors").write_bytes(b"of another run")
    sharded.write_sharded(CONTENT, temporary)
    assert same(sharded.read_sharded(temporary), CONTENT)


def test_it_takes_the_place_of_a_damaged_one(saved: Path) -> None:
    (saved / "rest.pt").write_bytes(b"")
    sharded.write_sharded(CONTENT, saved.with_suffix(".partial"))
    atomic.commit(saved.with_suffix(".partial"), saved)
    assert same(load.read_checkpoint(load.find_checkpoint(saved)), CONTENT)


def test_a_strangers_pickle_is_not_run(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    saved.with_name(f"{saved.name}.sha256").unlink()
    (saved / ".metadata").write_bytes(pickle.dumps(Trap()))  # where torch's own layout has one
    load.read_checkpoint(saved)
    (saved / "rest.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="it was not loaded"):
        load.read_checkpoint(saved)
    assert not (tmp_path / "ran").exists()


def test_its_hashes_are_what_sha256sum_reads(saved: Path) -> None:
    command = ["sha256sum", "--check", "--quiet", f"{saved.name}.sha256"]
    subprocess.run(command, cwd=saved.parent, capture_output=True, check=True)
    assert atomic.is_intact(saved)
    (saved / "one.more").write_bytes(b"")
    assert not atomic.is_intact(saved)
