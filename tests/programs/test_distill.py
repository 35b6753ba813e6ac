"""``experiment=distill``: trained, resumed, exported and sampled."""

import json
import shlex
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import NO_GRIDS, NO_PLOT, NO_PROFILE, SMALL_DATA, rendered_data, run_program
from tests.formats.conftest import assert_bit_equal
from tests.test_resume import differing
from wuerstchen_pl.checkpointing.load import find_checkpoint, read_checkpoint
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.model import STUDENT
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline


def train(base: Path, root: Path, *keys: str, steps: int = 4) -> int:
    return run_program(
        "train",
        [
            "stage=c", "experiment=distill", f"init_from={base}", f"paths.root={root}",
            f"paths.data={rendered_data()}", "data=openmoji", *SMALL_DATA, "data.num_workers=0",
            "cache=false", "trainer.accelerator=cpu", f"trainer.max_steps={steps}",
            f"validate_every_steps={steps}", f"checkpoint_every_steps={steps}", "logger=csv",
            NO_GRIDS, NO_PLOT, *NO_PROFILE, "stage.student_steps=2", "stage.teacher_steps=3",
            "stage.optimizer.lr=1e-3", "stage.lr_schedule.warmup_steps=0",
            "stage.lr_schedule.total_steps=4", *keys,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distilled")
    assert train(cascade / "c", root) == 0
    return root / "distill/c"


def prior_of(path: Path) -> dict[str, Tensor]:
    return {name: lazy.load() for name, lazy in read_run(path).parts["prior"].tensors.items()}


def test_a_checkpoint_has_the_student_and_names_its_teacher(run: Path, cascade: Path) -> None:
    content = read_checkpoint(find_checkpoint(run))
    assert {name.partition(".")[0] for name in content["state_dict"]} == {"prior"}
    base = read_checkpoint(find_checkpoint(cascade / "c"))
    teacher = content["frozen"]["teacher"]
    assert Path(teacher["absolute_path"]) == find_checkpoint(cascade / "c").absolute()
    assert content["state_dict"].keys() <= base["state_dict"].keys()
    assert all(
        not torch.equal(tensor, base["state_dict"][name])
        for name, tensor in content["state_dict"].items()
    )


def test_a_run_resumes_bit_for_bit(run: Path, cascade: Path, tmp_path: Path) -> None:
    assert train(cascade / "c", tmp_path / "half", steps=2) == 0
    checkpoint = tmp_path / "half/distill/c/checkpoints/step0000002.ckpt"
    assert train(cascade / "c", tmp_path / "resumed", f"ckpt={checkpoint}") == 0
    whole, resumed, half = (
        read_checkpoint(find_checkpoint(r))
        for r in (run, tmp_path / "resumed/distill/c", checkpoint)
    )
    assert not differing(whole, resumed)
    assert differing(whole, half)


def test_another_teacher_is_refused(
    run: Path, cascade: Path, random_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    keys = [f"{key}={cascade / 'c'}" for key in ("encoders", "compressor", "decoder")]
    assert train(random_base, tmp_path, *keys, f"ckpt={find_checkpoint(run)}", steps=6) == 1
    assert "the run was started with teacher sha256" in capsys.readouterr().err


def test_an_export_remembers_its_steps(run: Path, tmp_path: Path) -> None:
    keys = [f"ckpt={run}", f"to={tmp_path / 'model'}", "license=mit"]
    assert run_program("export", keys) == 0
    model = registry.read_model(str(tmp_path / "model"))
    assert model.settings[STUDENT] == 2
    tensors = {name: lazy.load() for name, lazy in model.parts["prior"].tensors.items()}
    assert_bit_equal(tensors, prior_of(run))
    pipe = WuerstchenPipeline.from_pretrained(str(tmp_path / "model"))
    with pytest.warns(UserWarning, match="distilled for 2 .at most 8. steps without guidance"):
        pipe("frog", 64, 64, prior_num_inference_steps=2, num_inference_steps=1, progress=False)


def test_another_prior_is_not_taken_for_the_student(run: Path, cascade: Path) -> None:
    assert registry.read_model(str(run)).settings[STUDENT] == 2
    assert STUDENT not in registry.read_model(str(run), prior=str(cascade / "c")).settings
    swapped = registry.read_model(str(cascade / "c"), prior=str(run))
    assert swapped.settings[STUDENT] == 2


def test_a_student_is_used_without_its_teacher(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The next command samples it without a warning; the export's card has its settings."""
    base = Path(shutil.copytree(cascade / "c", tmp_path / "base/c"))
    networks = [f"{key}={cascade / 'c'}" for key in ("decoder", "compressor", "encoders")]
    assert train(base, tmp_path, *networks, steps=1) == 0
    following = capsys.readouterr().out.strip().splitlines()[-1]
    shutil.rmtree(base)
    python, _, module, *keys = shlex.split(following.removeprefix("next: "))
    assert (python, module) == ("python", "wuerstchen_pl.sample")
    assert "sample=distilled" in keys
    out = tmp_path / "images"
    with warnings.catch_warnings(action="error"):
        assert run_program("sample", [*keys, "sample.decoder_steps=1", f"output_dir={out}"]) == 0
    assert len(list(out.glob("*.png"))) == 1
    keys = [f"ckpt={tmp_path / 'distill/c'}", f"to={tmp_path / 'model'}", "license=mit"]
    assert run_program("export", keys) == 0
    card = (tmp_path / "model/README.md").read_text()
    assert "seed=0, prior_num_inference_steps=2, prior_guidance_scale=0)" in card


def test_a_student_is_evaluated_without_a_loss_of_its_own(run: Path, tmp_path: Path) -> None:
    keys = [f"model={run}", "metric=[validation_loss,retrieval]", "num_prompts=2"]
    keys += ["sample=distilled", "sample.decoder_steps=1", f"output_dir={tmp_path}"]
    assert run_program("evaluate", keys) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert {"stage_b/loss", "retrieval/top1"} <= metrics.keys()
    assert not any(name.startswith("stage_c") for name in metrics)


def test_a_student_is_not_tuned_further(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(run, tmp_path) == 1
    assert "is a distilled Stage C, which no longer predicts noise" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_has_no_adapter_beside_it(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert train(cascade / "c", tmp_path, "dry_run=true") == 0
    table = capsys.readouterr().out
    assert "this run" in table
    assert "experiment=lora" not in table
