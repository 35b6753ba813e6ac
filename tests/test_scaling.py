"""docs/scaling.md is up to date, and its FLOPs equal a count by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scripts import scaling
from scripts.activation_memory import SavedBytes, saved_bytes
from wuerstchen_pl.models.layers import Attention
from wuerstchen_pl.models.prior import Prior

DOCUMENT = Path(__file__).parent.parent / "docs/scaling.md"


@pytest.mark.slow
def test_the_document_is_up_to_date() -> None:
    assert scaling.page(0.4, 200) == DOCUMENT.read_text()


def test_stage_c_is_counted_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "saved_bytes", lambda _: SavedBytes(1, 1))  # takes 3 s
    cost = scaling.recipe_cost("paper_c_2")
    assert cost.weights == 347_037_472  # the paper's
    assert cost.samples == 364_000 * 1536
    width, tokens, text, depth = 1280, 24 * 24, 77, 16
    block = 2 * width * (4 * width * 2 + 3 * width + width) * tokens  # MLP, q k v, out
    block += 2 * width * 9 * tokens  # depthwise
    block += 2 * width * (3 * width) * text  # projection, keys and values of the conditioning
    block += 2 * 2 * width * tokens * (tokens + text)  # attention scores and weighted sum
    text_encoder = 24 * (24 * 1024**2 * text + 4 * text**2 * 1024)
    assert 47e9 < text_encoder < 47.2e9  # ViT-H-14
    trained = 3 * depth * block
    frozen = cost.flops - trained
    assert text_encoder < frozen < text_encoder + 66.9e9 * 1.05 + 0.01 * trained


def test_hours_follow_from_an_a100s_peak_and_the_mfu() -> None:
    cost = scaling.RecipeCost(
        *("n", "c"), steps=10, batch=100, flops=312e12 * 3.6, weights=1, batch_per_gpu=1,
        saved=SavedBytes(1, 1),
    )  # fmt: skip
    assert cost.hours(1.0) == pytest.approx(1.0)
    assert cost.hours(0.25) == pytest.approx(4.0)


def test_activations_are_counted_as_by_hand() -> None:
    def mlp() -> Any:
        net = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        return [net], lambda n: net(torch.rand(n, 8))

    # in bfloat16: the inputs of both layers and of the GELU
    assert saved_bytes(mlp).plain == 2 * (8 + 32 + 32)

    def attention() -> Any:
        layer = Attention(8, 2)
        return [layer], lambda n: layer(torch.rand(n, 5, 8), None, None)

    # the input, q, k and v, the output, and a float32 sum for each query and head
    assert saved_bytes(attention).plain == 2 * 5 * (8 + 24 + 8) + 4 * 5 * 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_checkpointed_block_keeps_what_takes_long_to_compute(dropout: float) -> None:
    def prior(depth: int) -> Any:
        net = Prior(width=32, depth=depth, num_heads=2, text_dim=8, dropout=dropout)
        return [net], lambda n: net(torch.rand(n, 16, 6, 6), torch.rand(n), torch.rand(n, 3, 8))

    two, three = (saved_bytes(lambda d=d: prior(d)) for d in (2, 3))
    # its input and the output of its MLP; without dropout also that of attention, and for this a
    # float32 sum for each query
    attention = 0 if dropout else 2 * 32 * 36 + 4 * 2 * 36
    assert three.checkpointed - two.checkpointed == 2 * 2 * 32 * 36 + attention
    assert three.plain - two.plain > 10 * 2 * 32 * 36


def test_the_largest_batch_leaves_a_tenth_of_the_memory() -> None:
    weights = 10**9
    cost = scaling.RecipeCost("n", "c", 1, 8, 1.0, weights, 1, SavedBytes(1e9, 1e8))
    state = 20 * weights / 8
    for saved, batch in zip(cost.saved, (69, 695), strict=True):
        assert cost.fits(saved) == batch
        assert state + batch * saved <= 0.9 * 80e9 < state + (batch + 1) * saved
