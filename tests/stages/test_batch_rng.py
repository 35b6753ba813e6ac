"""Random numbers that depend only on the seed, the step and the row."""

import pytest
import torch

from tests.stages.conftest import STAGES
from wuerstchen_pl.stages.batch_rng import BatchRNG, derive_seed
from wuerstchen_pl.stages.stage import Batch


def numbers(rows: int, first_row: int = 0, seed: int = 0, step: tuple[int, int] = (5, 0)) -> list:
    rng = BatchRNG(seed=seed, step=step, rows=rows, first_row=first_row)
    return [rng.uniform(), rng.noise(torch.empty(rows, 3, 2)), rng.uniform(2)]


def test_two_processes_use_the_same_numbers_as_one() -> None:
    for whole, first, second in zip(numbers(6), numbers(3), numbers(3, 3), strict=True):
        assert torch.equal(whole, torch.cat([first, second]))


@pytest.mark.parametrize("shape", [(3,), (3, 2), (16, 3, 3), (4, 9, 7)])
def test_the_noise_of_a_row_is_what_torch_draws_from_its_generator(shape: tuple[int, ...]) -> None:
    rng = BatchRNG(seed=1, step=(5, 0), rows=3)
    drawn = rng.noise(torch.empty(3, *shape))
    seeds = [derive_seed(1, 5, 0, "row", row) for row in range(3)]
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert torch.equal(drawn, torch.stack(rows))


def test_numbers_of_the_whole_batch_are_the_same_on_every_process() -> None:
    one, other = (BatchRNG(seed=0, step=(5, 0), rows=2, first_row=r) for r in (0, 2))
    assert one.batch_uniform() == other.batch_uniform()
    assert torch.equal(one.randint(1000, 4), other.randint(1000, 4))


def test_another_seed_step_batch_or_row_gives_other_numbers() -> None:
    variants = [
        numbers(1),
        numbers(1, seed=1),
        numbers(1, step=(6, 0)),
        numbers(1, step=(5, 1)),
        numbers(1, 1),
    ]
    assert len({float(first[0]) for first, *_ in variants}) == len(variants)


def test_numbers_have_the_expected_distribution() -> None:
    rng = BatchRNG(seed=0, step=(0, 0), rows=2000)
    uniform, noise = rng.uniform(), rng.noise(torch.empty(2000, 16))
    assert abs(float(uniform.mean()) - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    assert abs(float(noise.mean())) < 4 / 32_000**0.5
    assert abs(float(noise.std()) - 1) < 4 / 64_000**0.5
    # rows are independent: their means vary like the mean of 16 numbers
    assert abs(float(noise.mean(dim=1).std()) - 0.25) < 4 * 0.25 / 4000**0.5


def test_derived_seeds_are_distinct_and_in_range() -> None:
    seeds = [
        derive_seed(seed, step, "row", row) for seed in (0, 1) for step in (0, 1) for row in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) >= 2**62  # all 63 bits are used


@pytest.mark.parametrize("name", ["b", "c", "ldm"])
def test_validation_losses_do_not_depend_on_the_rest_of_the_batch(name: str, batch: Batch) -> None:
    """Nor on the order; each sample has one time in each quarter."""
    stage = STAGES[name]().eval()
    times, losses = stage.validation_losses(batch)  # type: ignore[operator]
    assert ((times * 4).long() == torch.arange(4)).all()
    assert times.unique().numel() == times.numel()
    subset = {
        k: v[[2, 0]] if isinstance(v, torch.Tensor) else [v[2], v[0]] for k, v in batch.items()
    }
    other_times, other_losses = stage.validation_losses(subset)  # type: ignore[operator]
    assert torch.equal(other_times, times[[2, 0]])
    torch.testing.assert_close(other_losses, losses[[2, 0]])
