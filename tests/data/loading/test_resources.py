"""Decoding is sized by the dataset: workers by images, and memory by pixels."""

import pytest

from wuerstchen_pl.data.loading.resources import choose_num_workers, fit_in_memory


@pytest.mark.parametrize(
    ("num_images", "workers"), [(1, 1), (99, 1), (100, 2), (700, 8), (10**9, 8)]
)
def test_workers_follow_the_number_of_images(num_images: int, workers: int) -> None:
    assert choose_num_workers(num_images) == workers


def test_images_that_take_a_gigabyte_fit() -> None:
    sizes = [(64, 64), (50, 100)]
    number = 10**9 // (3 * 100 * 200)  # the larger size, twice as high and wide
    assert fit_in_memory(number, sizes)
    assert not fit_in_memory(number + 1, sizes)
    assert fit_in_memory(number // 4, sizes, crop_share=0.5)
    assert not fit_in_memory(number // 4 + 1, sizes, crop_share=0.5)
