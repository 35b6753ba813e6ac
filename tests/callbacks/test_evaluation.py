"""Evaluation during training gives the command's results, and does not affect training."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from tests.conftest import run_program, small
from tests.distributed.launch import launch
from tests.test_resume import differing
from wuerstchen_pl.callbacks import evaluation
from wuerstchen_pl.callbacks.restored_modes import restored_modes
from wuerstchen_pl.checkpointing import load

STEPS = 4
MEASURED = ["metric=[fid,retrieval,reconstruction,validation_loss]", "num_prompts=5"]
EVALUATED = [
    "callbacks=with_evaluation",
    "callbacks.evaluation.every_steps=2",
    "callbacks.evaluation.plan.metric=[fid,retrieval,reconstruction,validation_loss]",
    "callbacks.evaluation.plan.num_prompts=5",
    "callbacks.evaluation.plan.settings.prior_steps=2",
    "callbacks.evaluation.plan.settings.decoder_steps=1",
    "fid_features@callbacks.evaluation.plan.fid_features=random",
    "callbacks.evaluation.plan.fid_features.widths=[2,2]",
]


def train(root: Path, cascade: Path, *more: str) -> Path:
    paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    paths.append(f"paths.data={cascade.parent / 'data'}")
    keep = "callbacks.checkpoints.keep=9"
    overrides = [*small("c", root, STEPS), *paths, "trainer=cpu", "checkpoint_every_steps=50", keep]
    assert run_program("train", [*overrides, *more]) == 0
    return root / "default/c"


@pytest.fixture(scope="module")
def trained(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("during"), cascade, *EVALUATED)


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), STEPS])
def test_the_command_gives_the_same_results_for_the_same_checkpoint(
    trained: Path, step: int, tmp_path: Path
) -> None:
    fast = ["sample.prior_steps=2", "sample.decoder_steps=1", "fid_features=random"]
    model = f"model={trained / f'checkpoints/step{step:07d}.ckpt'}"
    overrides = [model, f"output_dir={tmp_path}", "fid_features.widths=[2,2]", *fast, *MEASURED]
    assert run_program("evaluate", overrides) == 0
    afterwards, during = (
        json.loads((folder / "metrics.json").read_text())["metrics"]
        for folder in (tmp_path, trained / f"evaluation/step{step:07d}")
    )
    assert afterwards.keys() == during.keys()
    assert {"fd_random", "retrieval/top1", "stage_a/psnr", "stage_c/loss"} <= during.keys()
    for name, score in during.items():
        assert afterwards[name]["value"] == pytest.approx(score["value"], rel=1e-5, abs=1e-9), name
    for path in sorted((tmp_path / "images").glob("*.png")):
        reference = trained / f"evaluation/step{step:07d}/images" / path.name
        assert ImageChops.difference(Image.open(path), Image.open(reference)).getbbox() is None


def test_the_metrics_are_logged(trained: Path) -> None:
    rows = [line.split(",") for line in (trained / "metrics.csv").read_text().splitlines()]
    logged = {name: float(value) for _, name, value, *_ in rows[1:] if name.startswith("eval/")}
    report = json.loads((trained / f"evaluation/step{STEPS:07d}/metrics.json").read_text())
    metrics = report["metrics"]
    assert logged["eval/fd_random"] == pytest.approx(metrics["fd_random"]["value"], rel=1e-4)
    assert len(logged) == len(metrics)


def test_evaluation_does_not_affect_training(trained: Path, cascade: Path, tmp_path: Path) -> None:
    plain = train(tmp_path, cascade)
    evaluated, reference = (
        load.read_checkpoint(load.find_checkpoint(run)) for run in (trained, plain)
    )
    assert not differing(evaluated, reference)


def test_another_stage_is_refused(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    overrides = [*small("a", tmp_path, STEPS), "callbacks=with_evaluation"]
    assert run_program("train", overrides) == 1
    assert "generates images, which needs Stage C; use callbacks=def" in capsys.readouterr().err


def test_training_modes_and_gradient_flags_are_restored() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())
    net[0].bias.requires_grad_(False)
    net[1].eval()

    def interrupted() -> None:
        with restored_modes(net):
            net.eval().requires_grad_(False)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert [p.requires_grad for p in net.parameters()] == [True, False]
    assert [part.training for part in net.modules()] == [True, True, False]


@pytest.mark.slow
def test_two_fsdp_processes_give_the_results_of_one(cascade: Path, tmp_path: Path) -> None:
    paths = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    paths.append(f"paths.data={cascade.parent / 'data'}")
    evaluation_overrides = [a.replace("every_steps=2", "every_steps=4") for a in EVALUATED]

    def overrides(root: Path, batch_size: int) -> list[str]:
        kept = [a for a in small("c", root, STEPS) if not a.startswith("data.batch_size")]
        return [*kept, *paths, *evaluation_overrides, f"data.batch_size={batch_size}"]

    assert run_program("train", [*overrides(tmp_path / "one", 4), "trainer=cpu"]) == 0
    launch([[*overrides(tmp_path / "two", 2), "trainer=fsdp", "trainer.devices=2"]], tmp_path)
    one, two = (
        json.loads((tmp_path / f"{n}/default/c/evaluation/step0000004/metrics.json").read_text())
        for n in ("one", "two")
    )
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, score in one["metrics"].items():
        # weights differ by 1e-6, so a few pixels differ by one level
        assert two["metrics"][name]["value"] == pytest.approx(score["value"], rel=1e-2), name


def test_an_evaluation_that_fails_does_not_end_training(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_evaluate(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluation, "evaluate", failing_evaluate)
    with pytest.warns(UserWarning, match=r"no evaluation at step [24]: No space left on device"):
        run = train(tmp_path, cascade, *EVALUATED)
    assert load.read_checkpoint(load.find_checkpoint(run))["global_step"] == STEPS


def test_an_invalid_plan_is_refused_before_training(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    too_wide = "callbacks.evaluation.plan.fid_features.widths=[9,9]"
    overrides = [*small("c", tmp_path, STEPS), *(f"paths.stage_{s}={cascade / s}" for s in "ab")]
    assert run_program("train", [*overrides, *EVALUATED, too_wide]) == 1
    assert "metric=fid needs at least 19 images in both sets" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))
