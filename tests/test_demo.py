"""The demo's report page, for a small cascade."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import demo_estimate
from scripts.demo_page import NEW_CAPTIONS, write_page
from tests.cli.test_config import composed
from wuerstchen_pl.evaluation.datasets import run_data


@pytest.mark.slow
def test_the_page_shows_images_curves_and_metrics(
    program: Callable[..., int], cascade: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs" / "default"
    shutil.copytree(cascade, folder)
    overrides = ["num_prompts=4", "sample.prior_steps=2", "sample.decoder_steps=1"]
    evaluation = folder / "evaluation"
    assert program("evaluate", f"model={folder / 'c'}", f"output_dir={evaluation}", *overrides) == 0
    page = write_page(folder, bf16=False).read_text(encoding="utf-8")
    num_validation = sum(len(batch["image"]) for batch in run_data(folder / "c").in_order("val"))
    assert page.count("<figure") == len(NEW_CAPTIONS) + 2 * 4 + 3 * num_validation
    assert page.count("<svg") == 1
    labels = {"step": 3, "loss": 3, "val/loss": 3, "Stage A": 1, "Stage B": 1, "Stage C": 1}
    assert {text: page.count(f"<!-- {text} -->") for text in labels} == labels
    metrics = json.loads((evaluation / "metrics.json").read_text())["metrics"]
    assert f"<th>stage_a/psnr</th><td>{metrics['stage_a/psnr']['value']:.4g}</td>" in page
    assert (folder / "new_captions.png").is_file()


def test_the_estimate_extrapolates_the_speed_to_the_steps_of_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training of 16 steps, simulated by its log: 100 samples per second, at first 1."""

    def simulated(command: list[str], **options: object) -> SimpleNamespace:
        typed = dict(argument.split("=", 1) for argument in command[3:])
        folder = Path(typed["paths.root"], "demo", typed["stage"])
        folder.mkdir(parents=True)
        rate = "speed/samples_per_second"
        (folder / "metrics.csv").write_text(f"step,metric,value\n7,{rate},1\n15,{rate},100\n")
        assert composed(*command[3:]).trainer.max_steps == demo_estimate.STEPS
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo_estimate.subprocess, "run", simulated)
    samples = 1200 * 16 + 1600 * 32 + 2000 * 48
    minutes = demo_estimate.training_minutes(["experiment=demo"], tmp_path)
    assert minutes == pytest.approx(samples / 100 / 60)
