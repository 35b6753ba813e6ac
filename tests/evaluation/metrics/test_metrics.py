"""Retrieval and reconstruction metrics on inputs with known results."""

import math

import pytest
import torch

from wuerstchen_pl.evaluation.metrics.reconstruction import compare_images, psnr, ssim
from wuerstchen_pl.evaluation.metrics.retrieval import pooled_pixels, ranks, shuffle_control


def test_retrieval_of_the_images_themselves_is_perfect() -> None:
    features = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    targets = list(range(0, 20, 3))
    assert ranks(features[targets], features, targets) == [0] * len(targets)


def test_retrieval_counts_ranks() -> None:
    reference = torch.arange(10.0)[:, None]
    # nearest to 0.2 are 0, 1, 2, 3, 4, 5: the targets are second and sixth
    assert ranks(torch.tensor([[0.2], [0.2]]), reference, [1, 5]) == [1, 5]


def test_ties_count_against_the_target() -> None:
    assert ranks(torch.zeros(4, 3), torch.zeros(8, 3), [0, 1, 2, 3]) == [7] * 4


def test_the_shuffled_control_matches_no_target() -> None:
    targets = [3, 5, 8, 9, 11]
    shuffled = shuffle_control(targets)
    assert sorted(shuffled) == targets
    assert all(a != b for a, b in zip(targets, shuffled, strict=True))


def test_pooled_pixels_do_not_depend_on_the_image_size() -> None:
    small = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    torch.testing.assert_close(*pooled_pixels([small, large]))


def test_psnr_and_ssim_are_computed_per_image() -> None:
    a = torch.full((2, 3, 16, 16), 0.5)
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    expected = [-20 * math.log10(0.1), -20 * math.log10(0.01)]
    values = compare_images([(a, b)], {"psnr": psnr, "ssim": ssim})
    assert values["psnr"] == pytest.approx(expected, abs=1e-3)
    assert values["ssim"][0] < values["ssim"][1] < 1
    one_by_one = compare_images([(a[:1], b[:1]), (a[1:], b[1:])], {"psnr": psnr, "ssim": ssim})
    assert one_by_one == values
