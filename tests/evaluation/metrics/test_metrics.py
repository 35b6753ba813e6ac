"""Metrics on images whose answer is known."""

import math

import pytest
import torch

from wuerstchen_pl.evaluation.metrics.reconstruction import compare_images, psnr, ssim
from wuerstchen_pl.evaluation.metrics.retrieval import pooled_pixels, ranks, shuffle_control


def test_retrieval_of_the_images_themselves_is_perfect() -> None:
    features = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    own = list(range(0, 20, 3))
    assert ranks(features[own], features, own) == [0] * len(own)


def test_retrieval_counts_ranks() -> None:
    reference = torch.arange(10.0)[:, None]
    # nearest to 0.2 are 0, 1, 2, 3, 4: its own is second in one case, sixth in the other
    assert ranks(torch.tensor([[0.2], [0.2]]), reference, [1, 5]) == [1, 5]


def test_equal_images_do_not_count_as_found() -> None:
    assert ranks(torch.zeros(4, 3), torch.zeros(8, 3), [0, 1, 2, 3]) == [7] * 4


def test_the_control_gives_nobody_its_own() -> None:
    own = [3, 5, 8, 9, 11]
    other = shuffle_control(own)
    assert sorted(other) == own
    assert all(a != b for a, b in zip(own, other, strict=True))


def test_pooled_pixels_do_not_depend_on_the_size() -> None:
    small = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    torch.testing.assert_close(*pooled_pixels([small, large]))


def test_psnr_is_that_of_the_error_of_each_image() -> None:
    a = torch.full((2, 3, 16, 16), 0.5)
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    wanted = [-20 * math.log10(0.1), -20 * math.log10(0.01)]
    found = compare_images([(a, b)], {"psnr": psnr, "ssim": ssim})
    assert found["psnr"] == pytest.approx(wanted, abs=1e-3)
    assert found["ssim"][0] < found["ssim"][1] < 1
    parts = compare_images([(a[:1], b[:1]), (a[1:], b[1:])], {"psnr": psnr, "ssim": ssim})
    assert parts == found
