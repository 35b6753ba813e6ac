"""Truncated SVDs of changes and of LoRAs, against their closed form."""

import re

import pytest
import torch
from torch import Tensor

from wuerstchen_pl.adapters.low_rank import RankLimit, resize, truncate
from wuerstchen_pl.adapters.weights import LowRank

SINGULAR = torch.tensor([8.0, 4.0, 4.0, 2.0, 1.0, 0.5])


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=rng))[0]


def with_singular_values() -> tuple[Tensor, Tensor]:
    """Factors (9, 6) and (6, 7) of a matrix with the values of ``SINGULAR``."""
    return orthonormal(9, 6, 0) * SINGULAR, orthonormal(7, 6, 1).T


def product(layer: LowRank) -> Tensor:
    return layer.up @ layer.down


@pytest.mark.parametrize("rank", range(1, 8))
def test_the_error_is_that_of_eckart_and_young(rank: int) -> None:
    up, down = with_singular_values()
    expected = SINGULAR[rank:].square().sum().sqrt()
    limit = RankLimit(rank, None)
    for smaller in (truncate(up @ down, limit), resize(LowRank(down, up), limit)):
        assert smaller.rank <= rank
        error = torch.linalg.matrix_norm(up @ down - product(smaller))
        torch.testing.assert_close(error, expected, atol=2e-5, rtol=1e-5)


def test_a_share_keeps_the_fewest_values_that_have_it() -> None:
    up, down = with_singular_values()
    norms = SINGULAR.square().cumsum(0).sqrt() / SINGULAR.square().sum().sqrt()
    for rank in range(1, 7):
        share = float(norms[rank - 1]) - 1e-4
        limit = RankLimit(None, share)
        for smaller in (truncate(up @ down, limit), resize(LowRank(down, up), limit)):
            assert smaller.rank == rank
            kept = torch.linalg.matrix_norm(product(smaller)) / torch.linalg.matrix_norm(up @ down)
            assert share <= kept < share + 2e-4
        limited = truncate(up @ down, RankLimit(2, share))
        assert limited.rank == min(rank, 2)


@pytest.mark.parametrize("rank", [3, 4, 99])
def test_a_larger_or_equal_rank_is_exact(rank: int) -> None:
    layer = LowRank(torch.randn(3, 40), torch.randn(50, 3), scale=0.7)
    same = resize(layer, RankLimit(rank, None))
    assert torch.equal(same.down, layer.down)
    assert torch.equal(same.up, layer.up)


def test_a_change_of_low_rank_comes_back() -> None:
    torch.manual_seed(0)
    change = torch.randn(50, 3) @ torch.randn(3, 40)
    extracted = truncate(change, RankLimit(None, 1 - 1e-6))
    assert extracted.rank == 3
    torch.testing.assert_close(product(extracted), change, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (RankLimit(None, None), "rank and share are null; set one of them"),
        (RankLimit(0, None), "rank=0 is out of range; use 1 or more, or null"),
        (RankLimit(4, 1.5), "share=1.5 is out of range; use 0 < share <= 1, or null"),
        (RankLimit(None, 0.0), "share=0.0 is out of range"),
    ],
)
def test_limits_that_limit_nothing_are_refused(limit: RankLimit, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        limit.check()
