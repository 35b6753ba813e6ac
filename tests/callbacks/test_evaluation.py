"""Evaluation within training finds what the command finds, and changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from tests.conftest import run_program, small
from tests.distributed.launch import launch
from tests.test_resume import differing
from wuerstchen_pl.callbacks import evaluation
from wuerstchen_pl.callbacks.evaluation import restored_modes
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
    above = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    above.append(f"paths.data={cascade.parent / 'data'}")
    kept = "callbacks.checkpoints.keep=9"
    told = [*small("c", root, STEPS), *above, "trainer=cpu", "checkpoint_every_steps=50", kept]
    assert run_program("train", [*told, *more]) == 0
    return root / "default/c"


@pytest.fixture(scope="module")
def trained(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("during"), cascade, *EVALUATED)


@pytest.mark.parametrize("step", [2, STEPS])
def test_the_command_finds_the_same_for_the_same_checkpoint(
    trained: Path, step: int, tmp_path: Path
) -> None:
    fast = ["sample.prior_steps=2", "sample.decoder_steps=1", "fid_features=random"]
    model = f"model={trained / f'checkpoints/step{step:07d}.ckpt'}"
    told = [model, f"output_dir={tmp_path}", "fid_features.widths=[2,2]", *fast, *MEASURED]
    assert run_program("evaluate", told) == 0
    afterwards, during = (
        json.loads((folder / "metrics.json").read_text())["metrics"]
        for folder in (tmp_path, trained / f"evaluation/step{step:07d}")
    )
    assert afterwards.keys() == during.keys()
    assert {"fd_random", "retrieval/top1", "stage_a/psnr", "stage_c/loss"} <= during.keys()
    for name, found in during.items():
        assert afterwards[name]["value"] == pytest.approx(found["value"], rel=1e-5, abs=1e-9), name
    for ours in sorted((tmp_path / "images").glob("*.png")):
        theirs = trained / f"evaluation/step{step:07d}/images" / ours.name
        assert ImageChops.difference(Image.open(ours), Image.open(theirs)).getbbox() is None


def test_the_log_has_them(trained: Path) -> None:
    rows = [line.split(",") for line in (trained / "metrics.csv").read_text().splitlines()]
    logged = {name: float(value) for _, name, value, *_ in rows[1:] if name.startswith("eval/")}
    told = json.loads((trained / f"evaluation/step{STEPS:07d}/metrics.json").read_text())["metrics"]
    assert logged["eval/fd_random"] == pytest.approx(told["fd_random"]["value"], rel=1e-4)
    assert len(logged) == len(told)


def test_training_goes_on_as_if_nothing_had_happened(
    trained: Path, cascade: Path, tmp_path: Path
) -> None:
    plain = train(tmp_path, cascade)
    one, other = (load.read_checkpoint(load.find_checkpoint(run)) for run in (trained, plain))
    assert not differing(one, other)


def test_another_stage_is_refused(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    told = [*small("a", tmp_path, STEPS), "callbacks=with_evaluation"]
    assert run_program("train", told) == 1
    assert "draws images, which takes Stage C; use callbacks=default" in capsys.readouterr().err


def test_what_was_frozen_and_trained_is_so_again() -> None:
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
def test_two_processes_of_fsdp_find_what_one_does(cascade: Path, tmp_path: Path) -> None:
    above = [f"paths.stage_{s}={cascade / s}" for s in "ab"]
    above.append(f"paths.data={cascade.parent / 'data'}")
    measured = [a.replace("every_steps=2", "every_steps=4") for a in EVALUATED]

    def told(root: Path, batch_size: int) -> list[str]:
        kept = [a for a in small("c", root, STEPS) if not a.startswith("data.batch_size")]
        return [*kept, *above, *measured, f"data.batch_size={batch_size}"]

    assert run_program("train", [*told(tmp_path / "one", 4), "trainer=cpu"]) == 0
    launch([[*told(tmp_path / "two", 2), "trainer=fsdp", "trainer.devices=2"]], tmp_path)
    one, two = (
        json.loads((tmp_path / f"{n}/default/c/evaluation/step0000004/metrics.json").read_text())
        for n in ("one", "two")
    )
    assert one["metrics"].keys() == two["metrics"].keys()
    for name, found in one["metrics"].items():
        # weights differ by 1e-6, and so pixels by a level here and there
        assert two["metrics"][name]["value"] == pytest.approx(found["value"], rel=1e-2), name


def test_an_evaluation_that_fails_ends_no_training(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluation, "evaluate", fails)
    with pytest.warns(UserWarning, match="no evaluation at step 2: No space left on device"):
        run = train(tmp_path, cascade, *EVALUATED)
    assert load.read_checkpoint(load.find_checkpoint(run))["global_step"] == STEPS


def test_what_could_not_be_measured_is_refused_before_training(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wide = "callbacks.evaluation.plan.fid_features.widths=[9,9]"
    told = [*small("c", tmp_path, STEPS), *(f"paths.stage_{s}={cascade / s}" for s in "ab")]
    assert run_program("train", [*told, *EVALUATED, wide]) == 1
    assert "metric=fid needs at least 19 images in both sets" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))
