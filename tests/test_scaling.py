"""The document of what recipes take is what is counted, and what is counted is right."""

from pathlib import Path

import pytest

from scripts import scaling

DOCUMENT = Path(__file__).parent.parent / "docs/scaling.md"


@pytest.mark.slow
def test_the_document_is_what_the_script_writes() -> None:
    assert scaling.page(0.4, 200) == DOCUMENT.read_text()


def test_stage_c_is_counted_as_by_hand() -> None:
    found = scaling.need("paper_c_2")
    assert found.weights == 347_037_472  # the paper's
    assert found.samples == 364_000 * 1536
    width, tokens, text, depth = 1280, 24 * 24, 77, 16
    of_block = 2 * width * (4 * width * 2 + 3 * width + width) * tokens  # MLP, q k v, out
    of_block += 2 * width * 9 * tokens  # depthwise
    of_block += 2 * width * (3 * width) * text  # the condition's map, keys and values
    of_block += 2 * 2 * width * tokens * (tokens + text)  # scores, and what they weigh
    of_text = 24 * (24 * 1024**2 * text + 4 * text**2 * 1024)
    assert 47e9 < of_text < 47.2e9  # ViT-H-14
    ours = 3 * depth * of_block
    frozen = found.flops - ours
    assert of_text < frozen < of_text + 66.9e9 * 1.05 + 0.01 * ours


def test_hours_are_those_of_an_a100_at_a_share_of_its_peak() -> None:
    one = scaling.Need("n", "c", steps=10, batch=100, flops=312e12 * 3.6, weights=1)
    assert one.hours(1.0) == pytest.approx(1.0)
    assert one.hours(0.25) == pytest.approx(4.0)
