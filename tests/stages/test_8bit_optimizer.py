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


def arguments(root: Path, above: Path) -> list[str]:
    keys = [a for a in small("c", root, 12) if "width=" not in a and "text_dim=" not in a]
    return [*keys, *WIDE, *(f"paths.stage_{s}={above / s}" for s in "ab")]


def train(root: Path, above: Path, *overrides: str) -> dict:
    assert run_program("train", [*arguments(root, above), *overrides]) == 0
    return load.read_checkpoint(load.find_checkpoint(root / "default/c"))


@pytest.fixture(scope="module")
def whole(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(tmp_path_factory.mktemp("eight"), cascade, EIGHT)


def tensors_of(node: object, above: str = "") -> dict[str, torch.Tensor]:
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        found = [tensors_of(value, f"{above}.{key}") for key, value in node.items()]
        return {name: tensor for part in found for name, tensor in part.items()}
    return {above: node} if isinstance(node, torch.Tensor) else {}


def distance(one: dict, other: dict) -> float:
    pairs = ((v, other["state_dict"][k]) for k, v in one["state_dict"].items())
    return sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5


def test_moments_take_a_quarter_and_train_the_same(
    whole: dict, cascade: Path, tmp_path: Path
) -> None:
    exact = train(tmp_path / "exact", cascade)
    sizes = [
        sum(t.nbytes for t in tensors_of(state["optimizer_states"]).values())
        for state in (whole, exact)
    ]
    assert 0.25 < sizes[0] / sizes[1] < 0.27  # 8 of 32 bits, with a scale for each 256 weights
    begun = train(tmp_path / "begun", cascade, "trainer.max_steps=1")
    assert distance(whole, exact) < 0.05 * distance(begun, exact)


def test_resuming_is_bit_equal(whole: dict, cascade: Path, tmp_path: Path) -> None:
    train(tmp_path, cascade, EIGHT, "trainer.max_steps=5")
    other = train(tmp_path, cascade, EIGHT, "ckpt=auto")
    for part in ("state_dict", "ema", "optimizer_states"):
        mine, theirs = tensors_of(whole[part]), tensors_of(other[part])
        assert mine
        assert mine.keys() == theirs.keys()
        assert [name for name, t in mine.items() if not torch.equal(t, theirs[name])] == []


def test_the_state_of_one_optimizer_is_not_loaded_into_another(
    cascade: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(tmp_path, cascade, EIGHT, "trainer.max_steps=5")
    assert run_program("train", [*arguments(tmp_path, cascade), "ckpt=auto"]) == 1
    assert "cannot use the optimizer state of bitsandbytes" in capsys.readouterr().err
