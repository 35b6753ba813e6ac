"""The length of a run follows from its images, and its schedule and intervals from its length."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from wuerstchen_pl.programs.run_length import choose_run_length, interval_for, steps_for
from wuerstchen_pl.stages.lr_schedule import WarmupCosine


@pytest.mark.parametrize("num_images", [1, 41, 100, 274, 1659, 10**6, 10**9])
def test_steps_grow_with_the_square_root_of_the_images(num_images: int) -> None:
    steps = steps_for(num_images)
    assert 1000 <= steps <= 100_000
    if 1000 < steps < 100_000:
        assert steps == pytest.approx(100 * math.sqrt(num_images), abs=50)


@pytest.mark.parametrize("max_steps", [0, 1, 9, 10, 1234, 10**6])
def test_every_run_is_validated_ten_times_or_every_thousand_steps(max_steps: int) -> None:
    interval = interval_for(max_steps)
    assert 1 <= interval <= 1000
    assert max_steps // interval >= 10 or max_steps < 10
    assert interval_for(-1) == 1000


def config(**keys: Any) -> Any:
    auto = {"trainer": {"max_steps": "auto"}, "validate_every_steps": "auto"}
    return OmegaConf.create({**auto, "checkpoint_every_steps": "auto", **keys})


class Data:
    splits = SimpleNamespace(epoch_samples=400)

    def __init__(self) -> None:
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self) -> None:
        self.calls.append("setup")


def test_only_auto_is_chosen() -> None:
    cfg, data = config(validate_every_steps=7), Data()
    choose_run_length(cfg, data)  # type: ignore[arg-type]
    assert cfg == config(
        trainer={"max_steps": 2000}, validate_every_steps=7, checkpoint_every_steps=200
    )
    assert data.calls == ["prepare_data", "setup"]
    cfg = config(trainer={"max_steps": 50})
    choose_run_length(cfg, None)  # type: ignore[arg-type] # the data are not opened
    assert cfg.validate_every_steps == cfg.checkpoint_every_steps == 5


def test_processes_of_torchrun_do_not_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"set trainer\.max_steps to a number"):
        choose_run_length(config(), Data())  # type: ignore[arg-type]


@pytest.mark.parametrize("total_steps", [10, 1000, 500_000])
def test_a_warmup_below_one_is_a_share_of_the_run(total_steps: int) -> None:
    factor = WarmupCosine(warmup_steps=0.1, total_steps=total_steps, decay="cosine")
    steps = WarmupCosine(warmup_steps=total_steps // 10, total_steps=total_steps, decay="cosine")
    assert [factor(n) for n in range(0, total_steps, total_steps // 10)] == [
        steps(n) for n in range(0, total_steps, total_steps // 10)
    ]
    assert factor(total_steps // 10) == 1
    assert factor(total_steps) == 0


@pytest.mark.parametrize("total_steps", [None, -1])
@pytest.mark.parametrize("options", [{"warmup_steps": 0.1}, {"decay": "cosine"}])
def test_a_schedule_of_an_unlimited_run_cannot_depend_on_its_length(
    options: dict[str, Any], total_steps: int | None
) -> None:
    with pytest.raises(ValueError, match="depends on the length of the run"):
        WarmupCosine(**options, total_steps=total_steps)
