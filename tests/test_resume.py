"""An interrupted and resumed run ends bit-equal to an uninterrupted one."""

from pathlib import Path

import pytest
import torch

from tests.conftest import run_program, small
from wuerstchen_pl.checkpointing import load

STEPS = 7  # an epoch of the small data has 4 or 5 steps


def train(stage: str, root: Path, cascade: Path, *overrides: str) -> dict:
    """Train a small stage; returns the contents of the newest checkpoint."""
    arguments = [a for a in small(stage, root, STEPS) if not a.startswith("validate_every")]
    stage_paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    data = f"paths.data={cascade.parent / 'data'}"
    arguments += ["validate_every_steps=2", "checkpoint_every_steps=1", data, *stage_paths]
    assert run_program("train", [*arguments, *overrides]) == 0
    return load.read_checkpoint(load.find_checkpoint(root / "default" / stage))


def differing(one: dict, other: dict) -> list[str]:
    """Names of the tensors that differ in weights, EMA weights or optimizer state."""
    names = [k for k, v in one["state_dict"].items() if not torch.equal(v, other["state_dict"][k])]
    shadow = other["ema"]["shadow"]
    names += [f"ema.{k}" for k, v in one["ema"]["shadow"].items() if not torch.equal(v, shadow[k])]
    pairs = zip(one["optimizer_states"], other["optimizer_states"], strict=True)
    for first, second in pairs:
        for index, state in first["state"].items():
            for name, value in state.items():
                if not torch.equal(
                    torch.as_tensor(value), torch.as_tensor(second["state"][index][name])
                ):
                    names.append(f"optimizer.{index}.{name}")
    return names


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cascade: Path) -> Path:
    """The root of a finished run of Stage C."""
    root = tmp_path_factory.mktemp("finished")
    train("c", root, cascade)
    return root


FAST = (("a", 4), ("b", 5), ("c", 3))
"""During an epoch, and at both of its possible last steps; the other cases are slow."""


@pytest.mark.parametrize(
    ("stage", "stop"),
    [
        pytest.param(stage, stop, marks=[] if (stage, stop) in FAST else pytest.mark.slow)
        for stage in "abc"
        for stop in (3, 4, 5)
    ],
)
def test_resume_is_bit_exact(stage: str, stop: int, cascade: Path, tmp_path: Path) -> None:
    whole = train(stage, tmp_path / "whole", cascade)
    train(stage, tmp_path / "parts", cascade, f"trainer.max_steps={stop}")
    resumed = train(stage, tmp_path / "parts", cascade, "ckpt=auto")
    assert resumed["global_step"] == whole["global_step"] == STEPS
    assert not differing(whole, resumed)


@pytest.mark.slow
def test_the_comparison_detects_another_seed(cascade: Path, tmp_path: Path) -> None:
    whole = train("c", tmp_path / "whole", cascade)
    assert differing(whole, train("c", tmp_path / "other", cascade, "seed=1"))


def test_the_log_of_a_resumed_run_has_each_step_once(cascade: Path, tmp_path: Path) -> None:
    train("c", tmp_path, cascade, "trainer.max_steps=4", "trainer.log_every_n_steps=1")
    train("c", tmp_path, cascade, "trainer.log_every_n_steps=1", "ckpt=auto")
    rows = (tmp_path / "default/c/metrics.csv").read_text().splitlines()
    steps = [int(r.split(",")[0]) for r in rows if ",train/loss," in r]
    assert steps == list(range(STEPS))


def test_a_finished_run_is_not_repeated(
    cascade: Path, finished: Path, capsys: pytest.CaptureFixture
) -> None:
    path = load.find_checkpoint(finished / "default/c")
    before = path.stat().st_mtime_ns
    train("c", finished, cascade, "ckpt=auto")
    assert path.stat().st_mtime_ns == before
    assert "is already finished at step 7" in capsys.readouterr().err


def test_a_run_is_not_overwritten(
    cascade: Path, finished: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*small("c", finished), *(f"paths.stage_{s}={cascade / s}" for s in "ab")]
    assert run_program("train", arguments) == 1
    assert "ckpt=auto" in capsys.readouterr().err
