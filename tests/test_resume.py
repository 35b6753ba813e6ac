"""An interrupted and resumed run ends bit-equal to an uninterrupted one."""

import shutil
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


@pytest.fixture(scope="module")
def nine_steps(tmp_path_factory: pytest.TempPathFactory, cascade: Path) -> dict:
    """The checkpoint of an uninterrupted run of Stage C with two steps more."""
    return train("c", tmp_path_factory.mktemp("nine"), cascade, "trainer.max_steps=9")


FAST = (("b", 5), ("c", 3))
"""At the last step of an epoch, and before; the other cases are slow."""


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


@pytest.mark.parametrize(
    "saved", ["during the last step", pytest.param("at the end", marks=pytest.mark.slow)]
)
def test_the_log_of_a_resumed_run_has_each_step_once(
    saved: str, cascade: Path, tmp_path: Path
) -> None:
    every_steps = "checkpoint_every_steps=" + ("1" if saved == "during the last step" else "3")
    more = ["trainer.log_every_n_steps=1", every_steps]
    train("c", tmp_path, cascade, "trainer.max_steps=4", *more)
    train("c", tmp_path, cascade, *more, "ckpt=auto")
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


@pytest.mark.parametrize(
    "end",
    [
        pytest.param("trainer.max_steps=3", marks=pytest.mark.slow),
        pytest.param("trainer.max_epochs=1", marks=pytest.mark.slow),
        "trainer.max_time={milliseconds: 1}",  # after the first step
        # an end at which a checkpoint was just saved
        pytest.param("callbacks.checkpoints.every_steps=4", marks=pytest.mark.slow),
    ],
)
def test_a_run_saves_at_every_normal_end_and_can_be_trained_further(
    end: str, cascade: Path, nine_steps: dict, tmp_path: Path
) -> None:
    seldom, unlimited = "checkpoint_every_steps=1000", "trainer.max_steps=-1"
    first = [end] if "steps" in end else [unlimited, end]
    stopped = train("c", tmp_path / "parts", cascade, seldom, *first)
    assert 0 < stopped["global_step"] <= STEPS
    resumed = train("c", tmp_path / "parts", cascade, seldom, "ckpt=auto", "trainer.max_steps=9")
    assert resumed["global_step"] == nine_steps["global_step"] == 9
    assert not differing(nine_steps, resumed)


def hyperparameters(content: dict) -> dict:
    group = content["optimizer_states"][0]["param_groups"][0]
    return {name: value for name, value in group.items() if name != "params"}


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("stage.optimizer.lr=0.01", "lr", 0.01),
        pytest.param(
            "+stage.optimizer.weight_decay=0.5", "weight_decay", 0.5, marks=pytest.mark.slow
        ),
        pytest.param(
            "stage.optimizer.betas=[0.5,0.6]", "betas", (0.5, 0.6), marks=pytest.mark.slow
        ),
        ("stage.lr_schedule.warmup_steps=19", "lr", 1e-3 * 10 / 20),
        ("stage.lr_schedule.decay=cosine stage.lr_schedule.total_steps=18", "lr", 1e-3 * 0.5),
    ],
)
def test_a_hyperparameter_that_changes_on_resume_takes_effect(
    override: str, name: str, value: object, cascade: Path, finished: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(finished / "default", tmp_path / "default")
    old = load.read_checkpoint(load.find_checkpoint(run / "c"))
    new = train("c", tmp_path, cascade, "ckpt=auto", "trainer.max_steps=9", *override.split())
    assert hyperparameters(new)[name] == pytest.approx(value)
    assert hyperparameters(old)[name] != pytest.approx(value)
    assert all(not torch.equal(old["state_dict"][k], v) for k, v in new["state_dict"].items())


def test_a_schedule_that_ends_before_the_run_is_refused(
    cascade: Path, finished: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [*small("c", finished, 9), *(f"paths.stage_{s}={cascade / s}" for s in "ab")]
    short = [*arguments, "ckpt=auto", "stage.lr_schedule.decay=cosine"]
    short.append("stage.lr_schedule.total_steps=8")
    assert run_program("train", short) == 1
    assert "reaches a learning rate of 0 before trainer.max_steps=9" in capsys.readouterr().err
    unlimited = [a for a in short if "max_steps" not in a]
    assert run_program("train", [*unlimited, "trainer.max_steps=-1"]) == 1
    stderr = capsys.readouterr().err
    assert "total_steps to trainer.max_steps, or stage.lr_schedule.decay=none" in stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.prior.width=32", "stage.prior.width was 16, and is now 32"),
        ("stage.prior.depth=2", "stage.prior.depth was 1, and is now 2"),
        ("stage.text_encoder.depth=2", "stage.text_encoder.depth was 1, and is now 2"),
        ("stage.prior.text_dim=32 stage.text_encoder.width=32", "stage.prior.text_dim was 16"),
        ("ckpt=other", "is a checkpoint of stage=b, but this is stage=c"),
        ("stage.optimizer._target_=torch.optim.Adam", "cannot use the optimizer state of"),
        ("trainer.max_steps=9 data.batch_size=0", "data.batch_size=0 is out of range"),
    ],
)
def test_a_refused_resume_names_the_key_and_changes_no_file(
    override: str, message: str, cascade: Path, finished: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    shutil.copytree(finished / "default", tmp_path / "default")
    before = contents(tmp_path)
    overrides = [f"ckpt={cascade / 'b'}" if o == "ckpt=other" else o for o in override.split()]
    typed = {o.split("=")[0] for o in overrides}
    arguments = [a for a in small("c", tmp_path, 9) if a.split("=")[0] not in typed]
    arguments += [*(f"paths.stage_{s}={cascade / s}" for s in "ab"), *overrides]
    arguments += [f"paths.data={cascade.parent / 'data'}"]
    arguments += ["ckpt=auto"] * ("ckpt" not in typed)
    assert run_program("train", arguments) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert line.startswith("error: ")
    assert contents(tmp_path) == before


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}
