"""Metrics on pictures whose answer is known."""

import math

import pytest
import torch

from wuerstchen_pl.metrics.reconstruction import reconstruction
from wuerstchen_pl.metrics.retrieval import pooled_pixels, retrieval, shifted


def test_retrieval_of_the_pictures_themselves_is_perfect() -> None:
    features = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    own = list(range(0, 20, 3))
    assert retrieval(features[own], features, own) == {"top1": 1, "top5": 1, "chance_top5": 0.25}


def test_retrieval_counts_ranks() -> None:
    reference = torch.arange(10.0)[:, None]
    # nearest to 0.2 are 0, 1, 2, 3, 4: its own is second in one case, sixth in the other
    found = retrieval(torch.tensor([[0.2], [0.2]]), reference, [1, 5])
    assert (found["top1"], found["top5"]) == (0, 0.5)


def test_equal_pictures_do_not_count_as_found() -> None:
    assert retrieval(torch.zeros(4, 3), torch.zeros(8, 3), [0, 1, 2, 3])["top5"] == 0


def test_the_control_gives_nobody_its_own() -> None:
    own = [3, 5, 8, 9, 11]
    other = shifted(own)
    assert sorted(other) == own
    assert all(a != b for a, b in zip(own, other, strict=True))


def test_pooled_pixels_do_not_depend_on_the_size() -> None:
    small = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    torch.testing.assert_close(*pooled_pixels([small, large]))


def test_psnr_is_that_of_the_error_of_each_picture() -> None:
    a = torch.full((2, 3, 16, 16), 0.5)
    b = a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    wanted = (-20 * math.log10(0.1) - 20 * math.log10(0.01)) / 2
    found = reconstruction([(a, b)])
    assert found["psnr"] == pytest.approx(wanted, abs=1e-3)
    assert found["pictures"] == 2
    assert reconstruction([(a[:1], b[:1]), (a[1:], b[1:])]) == pytest.approx(found)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        reconstruction([])
