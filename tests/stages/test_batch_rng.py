"""Random numbers that depend on the seed, the step and the row alone."""

import pytest
import torch

from tests.stages.conftest import STAGES
from wuerstchen_pl.stages.batch_rng import BatchRNG, derive_seed
from wuerstchen_pl.stages.stage import Batch


def drawn(rows: int, first_row: int = 0, seed: int = 0, step: tuple[int, int] = (5, 0)) -> list:
    rng = BatchRNG(seed=seed, step=step, rows=rows, first_row=first_row)
    return [rng.uniform(), rng.noise(torch.empty(rows, 3, 2)), rng.uniform(2)]


def test_two_processes_draw_the_halves_of_what_one_draws() -> None:
    for whole, first, second in zip(drawn(6), drawn(3), drawn(3, 3), strict=True):
        assert torch.equal(whole, torch.cat([first, second]))


def test_numbers_of_the_whole_batch_are_the_same_in_every_process() -> None:
    one, other = (BatchRNG(seed=0, step=(5, 0), rows=2, first_row=r) for r in (0, 2))
    assert one.batch_uniform() == other.batch_uniform()
    assert torch.equal(one.randint(1000, 4), other.randint(1000, 4))


def test_another_seed_step_batch_or_row_draws_others() -> None:
    places = [drawn(1), drawn(1, seed=1), drawn(1, step=(6, 0)), drawn(1, step=(5, 1)), drawn(1, 1)]
    assert len({float(first[0]) for first, *_ in places}) == len(places)


def test_numbers_are_spread_as_they_should_be() -> None:
    rng = BatchRNG(seed=0, step=(0, 0), rows=2000)
    uniform, noise = rng.uniform(), rng.noise(torch.empty(2000, 16))
    assert abs(float(uniform.mean()) - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    assert abs(float(noise.mean())) < 4 / 32_000**0.5
    assert abs(float(noise.std()) - 1) < 4 / 64_000**0.5
    # rows are independent of one another: means of rows vary as those of 16 numbers do
    assert abs(float(noise.mean(dim=1).std()) - 0.25) < 4 * 0.25 / 4000**0.5


def test_seeds_of_neighbors_have_nothing_in_common() -> None:
    seeds = [
        derive_seed(seed, step, "row", row) for seed in (0, 1) for step in (0, 1) for row in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("name", ["b", "c", "ldm"])
def test_an_images_validation_losses_are_its_own(name: str, batch: Batch) -> None:
    """Whatever else is in the batch, and in whatever order; at a time in each quarter."""
    stage = STAGES[name]().eval()
    times, losses = stage.validation_losses(batch)  # type: ignore[operator]
    assert ((times * 4).long() == torch.arange(4)).all()
    assert times.unique().numel() == times.numel()
    turned = {
        k: v[[2, 0]] if isinstance(v, torch.Tensor) else [v[2], v[0]] for k, v in batch.items()
    }
    other_times, other_losses = stage.validation_losses(turned)  # type: ignore[operator]
    assert torch.equal(other_times, times[[2, 0]])
    torch.testing.assert_close(other_losses, losses[[2, 0]])
