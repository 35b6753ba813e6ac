"""``cache=true``: the cache that the program ``cache`` writes, built before the first step."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import small, what_cache_reads
from wuerstchen_pl.checkpointing.load import find_checkpoint, read_checkpoint

Program = Callable[..., int]


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(find_checkpoint(run))["state_dict"]


@pytest.mark.slow
def test_training_equals_that_on_a_cache_of_the_program(
    cascade: Path, program: Program, tmp_path: Path
) -> None:
    keys = [
        *small("c", tmp_path, steps=3),
        f"paths.data={tmp_path / 'data'}",
        f"paths.stage_b={cascade / 'b'}",
    ]
    assert program("train", *keys, "cache=true") == 0
    (cache,) = (tmp_path / "data/cached").iterdir()
    reads = what_cache_reads(keys)
    assert program("cache", *reads, f"out={tmp_path / 'cache'}", "crops=4") == 0
    network = [key for key in keys if not key.startswith(("data.limit", "data.val_fraction"))]
    cached = ["data=cached", f"data.root={tmp_path / 'cache'}", "data.num_workers=0", "name=two"]
    assert program("train", *network, *cached) == 0
    first, second = state_of(tmp_path / "default/c"), state_of(tmp_path / "two/c")
    assert all(torch.equal(first[name], second[name]) for name in second)
    written = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert program("train", *keys, "cache=true", "name=again") == 0
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    assert program("train", *keys, "cache=true", "name=more", "data.limit=20") == 0
    assert len(list(cache.parent.iterdir())) == 2


@pytest.mark.parametrize(
    ("stage", "keys", "message"),
    [
        ("a", [], "stage=a trains on images, not on a cache"),
        ("c", ["data.mask=alpha"], "data.mask='alpha' needs the images"),
    ],
)
def test_what_cannot_be_cached_is_refused(
    stage: str,
    keys: list[str],
    message: str,
    cascade: Path,
    program: Program,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    keys = [*small(stage, tmp_path), f"paths.stage_b={cascade / 'b'}", "cache=true", *keys]
    assert program("train", *keys) == 1
    assert message in capsys.readouterr().err


def test_several_processes_do_not_build_one_cache(
    cascade: Path,
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    keys = [*small("c", tmp_path), f"paths.stage_b={cascade / 'b'}", "cache=true"]
    assert program("train", *keys) == 1
    assert "cache=true is not supported by torchrun and Slurm" in capsys.readouterr().err
