"""docs/scaling.md is up to date, and its FLOPs equal a count by hand."""

from pathlib import Path

import pytest

from scripts import scaling

DOCUMENT = Path(__file__).parent.parent / "docs/scaling.md"


@pytest.mark.slow
def test_the_document_is_up_to_date() -> None:
    assert scaling.page(0.4, 200) == DOCUMENT.read_text()


def test_stage_c_is_counted_as_by_hand() -> None:
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
    cost = scaling.RecipeCost("n", "c", steps=10, batch=100, flops=312e12 * 3.6, weights=1)
    assert cost.hours(1.0) == pytest.approx(1.0)
    assert cost.hours(0.25) == pytest.approx(4.0)
