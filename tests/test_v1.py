"""Version 1 end to end: its Stage B trains, resumes, draws, is evaluated, exported and tuned."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SMALL_NETWORK, run_program, small
from tests.test_resume import differing
from wuerstchen_pl.checkpointing.load import find_checkpoint, read_checkpoint
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.model import PAELLA, V1_SCALING
from wuerstchen_pl.pipelines.loading import load_pipeline
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline

SMALL_TOKENS = [
    "stage.paella.widths=[16,16]", "stage.paella.num_blocks=[1,1]", "stage.paella.num_heads=[2,2]",
    "stage.paella.cond_dim=8", "stage.paella.codebook_size=16", "stage.paella.token_dim=8",
    "stage.compressor.backbone.width=4",
]  # fmt: skip


def token_stage(root: Path, cascade: Path, *more: str, steps: int = 4) -> list[str]:
    usual = [key for key in small("b", root, steps) if key not in SMALL_NETWORK["b"]]
    return [*usual, "preset=tiny_v1", *SMALL_TOKENS, f"paths.stage_a={cascade / 'a'}", *more]


@pytest.fixture(scope="module")
def v1(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs ``b`` and ``c`` of version 1."""
    root = tmp_path_factory.mktemp("v1")
    assert run_program("train", token_stage(root, cascade)) == 0
    assert run_program("train", [*small("c", root), "preset=tiny_v1"]) == 0
    return root / "default"


@pytest.mark.parametrize("cached", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_resume_is_bit_exact(cached: bool, cascade: Path, tmp_path: Path) -> None:
    more = ["validate_every_steps=3", "data.seed=3"]

    def train(name: str, *keys: str) -> dict[str, Any]:
        arguments = token_stage(tmp_path / name, cascade, *more, *keys, steps=5)
        assert run_program("train", arguments) == 0
        return read_checkpoint(find_checkpoint(tmp_path / name / "default/b"))

    keys = ["cache=true"] if cached else []
    whole = train("whole", *keys)
    train("parts", *keys, "trainer.max_steps=3")
    assert not differing(whole, train("parts", *keys, "ckpt=auto"))


def test_a_run_draws_and_equals_its_export(v1: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(v1 / "c"), device="cpu")
    assert isinstance(pipe, WuerstchenPipeline)
    options: Any = {
        "seed": 3, "output_type": "np", "prior_num_inference_steps": 2, "num_inference_steps": 2,
        "progress": False,
    }  # fmt: skip
    expected = pipe("a fox", 64, 64, **options).images
    assert run_program("export", [f"ckpt={v1 / 'c'}", f"to={tmp_path / 'model'}"]) == 0
    model = registry.read_model(str(tmp_path / "model"))
    assert model.parts["decoder"].config["_target_"] == PAELLA
    assert V1_SCALING.items() <= model.settings.items()
    again = WuerstchenPipeline.from_pretrained(tmp_path / "model")
    assert (again("a fox", 64, 64, **options).images == expected).all()


def test_a_run_is_evaluated(v1: Path, tmp_path: Path) -> None:
    few = ["num_prompts=2", "sample.prior_steps=2", "sample.decoder_steps=2"]
    assert run_program("evaluate", [f"model={v1 / 'c'}", f"output_dir={tmp_path}", *few]) == 0
    scores = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert scores.keys() >= {"stage_b/psnr", "stage_b/loss", "stage_c/loss", "retrieval/top1"}
    untrained = math.log(16)  # the cross-entropy if all 16 tokens are equally likely
    assert 0.5 * untrained < scores["stage_b/loss"]["value"] < untrained


@pytest.mark.parametrize("experiment", [pytest.param("finetune", marks=pytest.mark.slow), "lora"])
def test_the_prior_is_tuned(experiment: str, v1: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    assert run_program("export", [f"ckpt={v1 / 'c'}", f"to={model}"]) == 0
    keys = [key for key in small("c", tmp_path, 2) if key not in SMALL_NETWORK["c"]]
    source = [f"experiment={experiment}", f"init_from={model}", "data=openmoji"]
    assert run_program("train", [*keys, *source, "name=tuned", "image_size=64"]) == 0
    stage = read_checkpoint(find_checkpoint(tmp_path / "tuned/c"))["stage"]
    assert (stage["semantic_scale"], stage["semantic_shift"]) == (1.0, 0.0)
    assert load_pipeline(str(tmp_path / "tuned/c"), device="cpu")
