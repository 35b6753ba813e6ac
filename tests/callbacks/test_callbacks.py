"""What watches a run: steps that are not finite, norms, rates and costs, the loss over t."""

import time
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.conftest import run_program
from tests.test_train import arguments
from wuerstchen_pl.callbacks import memory_estimate, step_profile, throughput
from wuerstchen_pl.callbacks.loss_by_timestep import LossByTimestep, plot_losses
from wuerstchen_pl.callbacks.memory_estimate import estimate_bytes
from wuerstchen_pl.callbacks.skip_nonfinite import SkipNonFiniteGrads
from wuerstchen_pl.callbacks.throughput import Throughput, peak_tflops
from wuerstchen_pl.callbacks.weight_norms import WeightNormMonitor
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.stage import Stage
from wuerstchen_pl.stages.timestep_bins import TimestepBins

ROWS, WIDE, NARROW = 4, 6, 3


class Line(Stage):
    """A linear map, whose loss is NaN in steps that it is told."""

    def __init__(
        self, *, lost: tuple[int, ...] = (), lr: float = 0.1, momentum: float = 0.9
    ) -> None:
        super().__init__(optimizer=None, lr_schedule=None, ema=None, seed=0)
        torch.manual_seed(0)
        self.net = nn.Linear(WIDE, NARROW, bias=False)
        self.lost, self.lr, self.momentum = lost, lr, momentum
        self.logged: dict[str, list[float]] = {}
        self.weights: list[Tensor] = []

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        self.weights.append(self.net.weight.detach().clone())
        loss = self.net(batch["x"]).square().mean()
        return loss * (torch.nan if self.global_step in self.lost else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    def log(self, name: str, value: object, **options: object) -> None:  # type: ignore[override]
        self.logged.setdefault(name, []).append(float(value))  # type: ignore[arg-type]

    def log_dict(self, values: dict, **options: object) -> None:  # type: ignore[override]
        for name, value in values.items():
            self.log(name, value)


def batches(number: int) -> Iterator[dict]:
    x = torch.randn(ROWS, WIDE, generator=torch.Generator().manual_seed(0))
    for _ in range(number):
        yield {"x": x, "caption": ["a"] * ROWS}


def fit(module: Line, steps: int, *callbacks: L.Callback, data: object = None) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    loader = DataLoader(list(batches(steps)), batch_size=None) if data is None else data
    trainer.fit(module, loader)
    return trainer


def test_a_step_without_a_finite_gradient_changes_neither_weights_nor_moments() -> None:
    module, guard = Line(lost=(2,)), SkipNonFiniteGrads()
    fit(module, 5, guard)
    assert torch.equal(module.weights[2], module.weights[3])
    assert guard.skipped == 1
    undisturbed = Line()
    fit(undisturbed, 4, SkipNonFiniteGrads())  # the momentum is that of a run without the step
    torch.testing.assert_close(module.net.weight, undisturbed.net.weight, rtol=0, atol=0)


def test_a_step_that_is_left_out_leaves_no_trace_in_buffers() -> None:
    class Normed(Line):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)  # type: ignore[arg-type]
            self.norm = nn.BatchNorm1d(NARROW)

        def training_step(self, batch: dict, batch_idx: int) -> Tensor:
            x = batch["x"] * (torch.inf if self.global_step in self.lost else 1.0)
            self.weights.append(self.net.weight.detach().clone())
            return self.norm(self.net(x)).square().mean()

    module, other = Normed(lost=(2,)), Normed()
    fit(module, 5, SkipNonFiniteGrads())
    fit(other, 4, SkipNonFiniteGrads())
    assert torch.equal(module.norm.running_var, other.norm.running_var)
    assert torch.equal(module.norm.running_mean, other.norm.running_mean)


def test_many_in_a_row_end_the_run_and_others_do_not() -> None:
    with pytest.raises(
        ValueError, match=r"^3 steps in a row had non-finite gradients, up to step 4"
    ):
        fit(Line(lost=(2, 3, 4)), 9, SkipNonFiniteGrads(max_in_a_row=3))
    fit(Line(lost=(1, 2, 4, 5, 7)), 9, SkipNonFiniteGrads(max_in_a_row=3))


def test_a_run_that_diverges_names_its_last_checkpoint(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    loss = StageC.loss

    def lost(stage: StageC, *tensors: Tensor) -> Tensor:
        return loss(stage, *tensors) * (torch.nan if stage.global_step >= 2 else 1.0)

    monkeypatch.setattr(StageC, "loss", lost)
    told = [*arguments(cascade, tmp_path), "callbacks.skip_nonfinite.max_in_a_row=2"]
    assert run_program("train", told) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    newest = load.find_checkpoint(tmp_path / "default/c")
    assert f"the last checkpoint is {newest}" in said
    assert "Lower stage.optimizer.lr" in said
    assert all(v.isfinite().all() for v in load.read_checkpoint(newest)["state_dict"].values())


def test_norms_are_those_of_a_step_of_plain_descent() -> None:
    module = Line(lr=0.25, momentum=0.0)
    fit(module, 3, WeightNormMonitor(every_steps=4))
    moved = module.weights[2] - module.weights[1]
    size = module.weights[2].norm()
    assert module.logged["train/param_norm"] == pytest.approx([float(size)])
    assert module.logged["train/update_ratio"] == pytest.approx([float(moved.norm() / size)])


def test_rates_are_those_of_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    class Slow(Line):
        def training_step(self, batch: dict, batch_idx: int) -> Tensor:
            clock.now += 1
            return super().training_step(batch, batch_idx)

    class Loader:
        def __iter__(self) -> Iterator[dict]:
            for batch in batches(9):
                clock.now += 3
                yield batch

        def __len__(self) -> int:
            return 9

    clock, module = Clock(), Slow()
    monkeypatch.setattr(throughput, "time", clock)
    measured = Throughput(every_steps=4)
    fit(module, 9, measured, data=Loader())
    assert module.logged["speed/data_wait"] == pytest.approx([0.75, 0.75])
    assert module.logged["speed/samples_per_second"] == pytest.approx([ROWS / 4] * 2)
    assert measured._flops_per_sample == 3 * 2 * WIDE * NARROW


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Some CPU", None),
    ],
)
def test_a_device_is_known_by_the_words_of_its_name(name: str, peak: int | None) -> None:
    assert peak_tflops(name) == peak


def test_bands_hold_the_means_of_their_times_and_begin_anew() -> None:
    bands = TimestepBins()
    bands.add(torch.tensor([0.001, 0.05, 0.55]), torch.tensor([1.0, 3.0, 5.0]))
    bands.add(torch.tensor([1.0, 0.95]), torch.tensor([7.0, 9.0]))
    sums, counts = bands.pop()
    assert sums.tolist() == [4, 0, 0, 0, 0, 5, 0, 0, 0, 16]
    assert counts.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert bands.pop().sum() == 0
    bands.add(torch.tensor([0.05, 0.06]), torch.tensor([torch.inf, 2.0]))
    sums, counts = bands.pop()
    assert (float(sums[0]), float(counts[0])) == (2, 1)  # what is not finite is left out


def test_the_loss_over_t_is_logged_and_drawn(tmp_path: Path) -> None:
    module = Line()
    module.timestep_bins = TimestepBins()
    step = module.training_step

    def counted(batch: dict, batch_idx: int) -> Tensor:
        module.timestep_bins.add(torch.tensor([0.31, 0.97]), torch.tensor([2.0, 4.0 + batch_idx]))
        return step(batch, batch_idx)

    module.training_step = counted  # type: ignore[method-assign]
    callback = LossByTimestep(folder=str(tmp_path), every_steps=2)
    fit(module, 4, callback)
    assert module.logged["train/loss_t0.35"] == [2, 2]
    assert module.logged["train/loss_t0.95"] == [4.5, 6.5]
    assert "train/loss_t0.05" not in module.logged
    assert (tmp_path / "loss_by_t.png").is_file()
    again = LossByTimestep(folder=str(tmp_path), every_steps=2)
    again.load_state_dict(callback.state_dict())
    assert [at for at, _ in again.readings] == [2, 4]


def test_a_chart_shows_the_newest_reading_darkest() -> None:
    means = [1.0 - 0.09 * i for i in range(10)]
    canvas = plot_losses([(500, [m / 2 for m in means]), (1000, means)])
    colors = {color for _, color in canvas.getcolors(100_000)}  # type: ignore[union-attr]
    assert (30, 60, 140) in colors
    assert (230, 210, 240) in colors


def test_rates_stop_while_it_validates() -> None:
    callback = Throughput()
    callback._reset()
    begun = callback._since
    callback.on_validation_start(None, None)  # type: ignore[arg-type]
    time.sleep(0.05)
    callback.on_validation_end(None, None)  # type: ignore[arg-type]
    assert callback._since - begun >= 0.05


def test_a_trial_counts_by_samples_and_leaves_no_trace() -> None:
    class Both(Line):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(NARROW)
            self.frozen = {"wide": nn.Linear(WIDE, WIDE, bias=False).requires_grad_(False)}

        def training_step(self, batch: dict, batch_idx: int) -> Tensor:
            with torch.no_grad():
                x = self.frozen["wide"](batch["x"])
            self.log("train/loss", 0)
            loss = self.norm(self.net(x + torch.rand(x.shape)).repeat(2, 1)).square().mean()
            return loss

    module = Both()
    module.trainer = L.Trainer(accelerator="cpu", logger=False)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    torch.manual_seed(3)
    found = step_profile.profile_step(module, next(batches(1)))
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert drawn == torch.rand(())
    assert found.flops_per_sample == 2 * WIDE * WIDE + 3 * 2 * WIDE * NARROW
    assert module.logged == {}
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_the_memory_that_is_told_is_what_is_there() -> None:
    module, batch = Line(), next(batches(1))
    module.trainer = L.Trainer(accelerator="cpu", logger=False)
    module.frozen.register("wide", nn.Linear(WIDE, WIDE, bias=False))
    module.ema = EMA(decay=0.9)
    weights = 4 * WIDE * NARROW
    adam = torch.optim.AdamW(module.parameters())
    needed = estimate_bytes(module, adam, batch)
    # kept for the backward pass: x, and the map's output for the square
    kept = ROWS * 4 * (WIDE + NARROW)
    assert needed.pop("activations") == pytest.approx(kept, abs=ROWS * 16)
    assert needed == {
        "weights": weights, "frozen networks": 4 * WIDE * WIDE, "gradients": weights,
        "optimizer": 2 * weights, "ema": weights,
    }  # fmt: skip
    module.ema = EMA(decay=0.9, device="cpu")
    assert estimate_bytes(module, torch.optim.SGD(module.parameters()), batch)["ema"] == 0


@pytest.mark.parametrize(("told", "code"), [([], 1), (["check_memory=false"], 0)])
def test_what_cannot_fit_is_refused_before_its_first_step(
    told: list[str], code: int, cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(memory_estimate, "device_memory", lambda *_: 1000)
    assert run_program("train", [*arguments(cascade, tmp_path), *told]) == code
    said = capsys.readouterr()
    assert "memory, GB of 0.0: weights" in said.err
    assert ("or check_memory=false to try it" in said.err) == bool(code)


@pytest.mark.parametrize(("lacking", "fitting"), [(0.5, 2), (1.5, 2), (2.5, 1), (3.5, None)])
def test_the_largest_batch_that_fits_and_makes_the_same_step_is_named(
    lacking: float, fitting: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 batches of 4 samples a step, where so many samples' activations have no room."""
    module = Line()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=2)
    batch = next(batches(1))
    optimizer = torch.optim.AdamW(module.parameters())
    module.trainer.strategy.optimizers = [optimizer]
    of_sample = step_profile.profile_step_once(module, batch).saved_bytes_per_sample
    there = sum(estimate_bytes(module, optimizer, batch).values()) - lacking * of_sample
    monkeypatch.setattr(memory_estimate, "device_memory", lambda *_: there)
    named = f"set data.batch_size={fitting} global_batch=8, " if fitting else "set "
    with pytest.raises(ValueError, match=f"{named}activation_checkpointing=true"):
        memory_estimate.MemoryEstimate().on_train_batch_start(module.trainer, module, batch, 0)


def test_rows_of_a_batch_from_a_cache_are_those_of_its_samples() -> None:
    batch = {"semantic": torch.ones(2, 16, 3, 3), "caption": ["a", "b"], "size": (128, 96),
             "text": torch.ones(2, 7, 4), "empty_text": torch.ones(1, 7, 4)}  # fmt: skip
    one = step_profile.first_rows(batch, 1)
    assert one["size"] == (128, 96)
    assert [len(one[k]) for k in ("semantic", "caption", "text", "empty_text")] == [1, 1, 1, 1]
