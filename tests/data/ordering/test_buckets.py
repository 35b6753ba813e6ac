import math
from collections import Counter

import pytest

from tests.data.factories import fake_sample
from wuerstchen_pl.data.ordering.buckets import (
    DEFAULT_RATIOS,
    PAPER_RATIOS,
    Buckets,
    area_sizes,
    enlargement,
)


@pytest.mark.parametrize(("image_size", "multiple"), [(64, 16), (512, 32), (1024, 64)])
def test_sizes_keep_the_area_and_the_multiple(image_size: int, multiple: int) -> None:
    sizes = area_sizes(image_size, multiple)
    assert len(set(sizes)) == len(sizes)
    assert (image_size, image_size) in sizes
    assert sizes == sorted(
        (width, height) for height, width in sizes
    )  # symmetric in portrait and landscape
    shortest = min(min(size) for size in sizes)
    # Rounding moves each side by half a multiple at most.
    worst = 2 * math.log(shortest / (shortest - multiple / 2))
    for height, width in sizes:
        assert height % multiple == width % multiple == 0
        assert abs(math.log(height * width / image_size**2)) <= worst
    ratios = [width / height for height, width in sizes]
    assert 0.4 < min(ratios) <= 0.55
    assert 1.8 <= max(ratios) < 2.5


def test_the_papers_sizes_have_its_semantic_positions() -> None:
    # Appendix E.3: the compressor's 768 x 1280 pixels are 24 x 40 positions.
    sizes = Buckets(policy="paper", image_size=1024, multiple=32).sizes
    positions = [tuple(math.ceil(side * 0.75 / 32) for side in size) for size in sizes]
    assert positions == [(24, 24), (24, 40), (40, 24)]


def test_a_paper_size_is_drawn_per_batch_regardless_of_the_image() -> None:
    buckets = Buckets(policy="paper", image_size=64, multiple=16, seed=3)
    wide, tall = fake_sample("s", 0, 200, 100), fake_sample("s", 1, 100, 200)
    drawn = [buckets.assign(wide, batch) for batch in range(600)]
    assert drawn == [buckets.assign(tall, batch) for batch in range(600)]
    # 600 draws of a third each: the standard deviation is 11.5.
    assert all(abs(count - 200) < 50 for count in Counter(drawn).values())
    assert len(set(drawn)) == 3
    other = Buckets(policy="paper", image_size=64, multiple=16, seed=4)
    assert drawn != [other.assign(wide, batch) for batch in range(600)]


def test_listed_sizes_are_used_unchanged() -> None:
    buckets = Buckets(policy="sizes", image_size=1, multiple=16, sizes=[[64, 32], [32, 64]])
    assert buckets.sizes == [(32, 64), (64, 32)]
    assert buckets.assign(fake_sample("s", 0, 200, 100), 0) == (32, 64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "area", "image_size": 100}, r"image_size=100 .* use 96 or 128"),
        ({"policy": "area", "ratios": [-1.0]}, r"ratios=\[-1\.0\] is invalid"),
        ({"policy": "area", "sizes": [[64, 64]]}, r"sizes=.*use sizes with"),
        ({"policy": "sizes"}, r"sizes=None and buckets=sizes disagree"),
        ({"policy": "sizes", "sizes": [[64, 70]]}, r"contains \[64, 70\].*multiples of"),
        ({"policy": "sizes", "sizes": [[64, 64], [0, 64]]}, r"contains \[0, 64\]"),
        ({"policy": "sizes", "sizes": [[64, 64, 64]]}, r"contains \[64, 64, 64\]"),
        ({"policy": "area", "image_size": 16}, r"image_size=16 .* use 32 or 64"),
        ({"policy": "paper", "image_size": 65}, r"image_size=65 .* use 64 or 96"),
        ({"policy": "area", "multiple": 0}, r"bucket_multiple=0 pixels is out of range"),
        ({"policy": "area", "ratios": [1.0, 0.0]}, r"ratios=\[1\.0, 0\.0\] is invalid"),
        ({"policy": "area", "ratios": []}, r"ratios=\[\] is invalid"),
        ({"policy": "sizes", "sizes": []}, r"sizes=\[\] is empty"),
        ({"policy": "paper", "ratios": [1.0]}, r"ratios=\[1\.0\] is of buckets=area"),
    ],
)
def test_inconsistent_settings_are_rejected(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buckets(**{"image_size": 64, "multiple": 32} | settings)


def test_the_smallest_sizes_are_one_multiple() -> None:
    assert area_sizes(32, 32, [1.0]) == [(32, 32)]
    assert area_sizes(1, 1, [1.0]) == [(1, 1)]
    # The sides of ratio 1:16 would be 8 and 128, of which the shorter is below one multiple.
    assert area_sizes(32, 32, [16.0, 1 / 16]) == [(32, 128), (128, 32)]
    assert Buckets(policy="sizes", image_size=1, multiple=32, sizes=[[32, 64]]).sizes == [(32, 64)]
    assert Buckets(policy="paper", image_size=32, multiple=32).sizes[0] == (32, 32)


@pytest.mark.parametrize("ratios", [DEFAULT_RATIOS, PAPER_RATIOS])
def test_the_ratios_of_portraits_are_those_of_landscapes(ratios: tuple[float, ...]) -> None:
    assert sorted(1 / ratio for ratio in ratios) == pytest.approx(ratios)
    assert len(set(ratios)) == len(ratios)


def test_ratios_are_width_by_height() -> None:
    assert area_sizes(64, 16, [4.0]) == [(32, 128)]
    assert Buckets(policy="area", image_size=64, multiple=16, ratios=[4.0]).sizes == [(32, 128)]


def test_the_papers_long_side_is_rounded_to_the_nearest_multiple() -> None:
    sizes = Buckets(policy="paper", image_size=64, multiple=16).sizes
    assert max(max(size) for size in sizes) == 112  # 106.7, between 96 and 112


def test_enlargement_is_that_of_the_assigned_size() -> None:
    buckets = Buckets(policy="sizes", image_size=1, multiple=16, sizes=[[64, 64], [32, 96]])
    assert buckets.enlargement(fake_sample("s", 0, 48, 48)) == pytest.approx(64 / 48)
    assert buckets.enlargement(fake_sample("s", 0, 144, 48)) == pytest.approx(2 / 3)


def test_the_nearest_ratio_is_symmetric_in_the_logarithm() -> None:
    sizes = [(64, 64), (64, 128), (128, 64)]
    buckets = Buckets(policy="sizes", image_size=1, multiple=16, sizes=sizes)
    border = round(1000 * math.sqrt(2))
    assert buckets.assign(fake_sample("s", 0, border - 2, 1000), 0) == (64, 64)
    assert buckets.assign(fake_sample("s", 0, border + 2, 1000), 0) == (64, 128)
    assert buckets.assign(fake_sample("s", 0, 1000, border + 2), 0) == (128, 64)


def test_enlargement_is_the_larger_of_both_sides() -> None:
    assert enlargement(fake_sample("s", 0, 50, 100), (100, 100)) == 2
    assert enlargement(fake_sample("s", 0, 400, 200), (100, 100)) == 0.5


def test_enlargement_with_paper_sizes_is_that_of_the_square() -> None:
    buckets = Buckets(policy="paper", image_size=768, multiple=128)
    assert buckets.enlargement(fake_sample("s", 0, 768, 768)) == 1
    # The long sizes, which would enlarge a square image by 5/3, are not considered.
    assert {buckets.enlargement(fake_sample("s", 0, 512, n)) for n in (512, 768, 900)} == {1.5}
