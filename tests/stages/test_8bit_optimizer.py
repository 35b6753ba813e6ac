"""Optimizer state in 8 bits: a quarter of the memory, nearly the same training, exact resume."""

from pathlib import Path

import pytest
import torch

from tests.conftest import run_program, small
from wuerstchen_pl.checkpointing import load

pytest.importorskip("bitsandbytes", reason="needs the extra 8bit")
pytestmark = pytest.mark.slow

EIGHT = "optimizer@stage.optimizer=adamw_8bit"
WIDE = ("stage.prior.width=64", "stage.prior.text_dim=64", "stage.text_encoder.width=64")


def arguments(root: Path, cascade: Path) -> list[str]:
    keys = [a for a in small("c", root, 12) if "width=" not in a and "text_dim=" not in a]
    return [*keys, *WIDE, "global_batch=8", *(f"paths.stage_{s}={cascade / s}" for s in "ab")]


def train(root: Path, cascade: Path, *overrides: str) -> dict:
    assert run_program("train", [*arguments(root, cascade), *overrides]) == 0
    return load.read_checkpoint(load.find_checkpoint(root / "default/c"))


@pytest.fixture(scope="module")
def whole(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(tmp_path_factory.mktemp("eight"), cascade, EIGHT)


def tensors_of(node: object, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        parts = [tensors_of(value, f"{prefix}.{key}") for key, value in node.items()]
        return {name: tensor for part in parts for name, tensor in part.items()}
    return {prefix: node} if isinstance(node, torch.Tensor) else {}


def distance(one: dict, other: dict) -> float:
    pairs = ((v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5


def test_8bit_state_takes_a_quarter_of_the_memory_and_trains_the_same(
    whole: dict, cascade: Path, tmp_path: Path
) -> None:
    exact = train(tmp_path / "exact", cascade)
    sizes = [
        sum(t.nbytes for t in tensors_of(state["optimizer_states"]).values())
        for state in (whole, exact)
    ]
    assert 0.25 < sizes[0] / sizes[1] < 0.27  # 8 of 32 bits, and a scale per 256 weights
    first_step = train(tmp_path / "begun", cascade, "trainer.max_steps=1")
    assert distance(whole, exact) < 0.05 * distance(first_step, exact)


def test_resuming_is_bit_equal(whole: dict, cascade: Path, tmp_path: Path) -> None:
    train(tmp_path, cascade, EIGHT, "trainer.max_steps=5")
    resumed = train(tmp_path, cascade, EIGHT, "ckpt=auto")
    for part in ("state_dict", "ema", "optimizer_states"):
        expected, actual = tensors_of(whole[part]), tensors_of(resumed[part])
        assert expected
        assert expected.keys() == actual.keys()
        assert [name for name, t in expected.items() if not torch.equal(t, actual[name])] == []


def test_the_state_of_one_optimizer_is_not_loaded_into_another(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(tmp_path, cascade, EIGHT, "trainer.max_steps=5")
    assert run_program("train", [*arguments(tmp_path, cascade), "ckpt=auto"]) == 1
    assert "cannot use the optimizer state of bitsandbytes" in capsys.readouterr().err
