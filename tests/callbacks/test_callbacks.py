"""Training callbacks: non-finite gradients, norms, throughput, memory, and the loss over t."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.conftest import NO_PROFILE, run_program
from tests.stages.conftest import STAGES
from tests.test_train import arguments
from wuerstchen_pl.callbacks import memory_estimate, step_profile, throughput
from wuerstchen_pl.callbacks.loss_by_timestep import LossByTimestep, plot_losses
from wuerstchen_pl.callbacks.loss_trend import LossTrend
from wuerstchen_pl.callbacks.memory_estimate import estimate_bytes
from wuerstchen_pl.callbacks.skip_nonfinite import SkipNonFiniteGrads
from wuerstchen_pl.callbacks.throughput import Throughput, peak_tflops
from wuerstchen_pl.callbacks.weight_norms import WeightNormMonitor
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.distributed.fsdp2 import full_tensor
from wuerstchen_pl.distributed.strategy import FSDP2Strategy
from wuerstchen_pl.models.wrapping import find_blocks
from wuerstchen_pl.stages.c import StageC
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.stage import OptimizerFactory, Stage
from wuerstchen_pl.stages.timestep_bins import TimestepBins

ROWS, WIDE, NARROW = 4, 6, 3


class LinearStage(Stage):
    """A linear map whose loss is NaN in the steps of ``nan_steps``."""

    def __init__(
        self, *, nan_steps: tuple[int, ...] = (), lr: float = 0.1, momentum: float = 0.9,
        optimizer: OptimizerFactory | None = None,
    ) -> None:  # fmt: skip
        sgd = partial(torch.optim.SGD, lr=lr, momentum=momentum)
        super().__init__(optimizer=optimizer or sgd, lr_schedule=None, ema=None, seed=0)
        torch.manual_seed(0)
        self.net = nn.Linear(WIDE, NARROW, bias=False)
        self.nan_steps = nan_steps
        self.logged: dict[str, list[float]] = {}
        self.weights: list[Tensor] = []

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        self.weights.append(self.net.weight.detach().clone())
        loss = self.net(batch["x"]).square().mean()
        return loss * (torch.nan if self.global_step in self.nan_steps else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.optimizer_factory is not None
        return self.optimizer_factory(self.parameters())

    def log(self, name: str, value: object, **options: object) -> None:  # type: ignore[override]
        self.logged.setdefault(name, []).append(float(value))  # type: ignore[arg-type]

    def log_dict(self, values: dict, **options: object) -> None:  # type: ignore[override]
        for name, value in values.items():
            self.log(name, value)


def batches(number: int) -> Iterator[dict]:
    x = torch.randn(ROWS, WIDE, generator=torch.Generator().manual_seed(0))
    for _ in range(number):
        yield {"x": x, "caption": ["a"] * ROWS}


def fit(
    module: LinearStage, steps: int, *callbacks: L.Callback, data: object = None, **options: Any
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **options,
    )  # fmt: skip
    loader = DataLoader(list(batches(steps)), batch_size=None) if data is None else data
    trainer.fit(module, loader)
    return trainer


def optimizer_state(trainer: L.Trainer) -> list[Tensor]:
    """Weights, and the optimizer's state for each, as full tensors."""
    (optimizer,) = trainer.optimizers
    tensors = [t for p, state in optimizer.state.items() for t in (p.detach(), *state.values())]
    return [full_tensor(t) for t in tensors]


FUSED_ADAMW = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, fused=True)
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "fused adamw": FUSED_ADAMW}
STRATEGIES: dict[str, Callable[[], Any]] = {"one process": lambda: "auto", "fsdp": FSDP2Strategy}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("nan_steps", [(2,), (0, 3, 4)])
def test_a_step_with_nonfinite_gradients_changes_neither_weights_nor_optimizer_state(
    nan_steps: tuple[int, ...], optimizer: str, strategy: str
) -> None:
    def trained(callback: SkipNonFiniteGrads, steps: int, **options: Any) -> list[Tensor]:
        stage = LinearStage(optimizer=OPTIMIZERS[optimizer], **options)
        on = {"strategy": STRATEGIES[strategy](), "gradient_clip_val": 1.0}
        return optimizer_state(fit(stage, steps, callback, **on))

    callback = SkipNonFiniteGrads()
    skipping = trained(callback, 4 + len(nan_steps), nan_steps=nan_steps)
    reference = trained(SkipNonFiniteGrads(), 4)
    assert len(reference) >= 2
    assert all(torch.equal(a, b) for a, b in zip(skipping, reference, strict=True))
    assert callback.state_dict() == {"skipped": len(nan_steps)}


def test_a_skipped_step_does_not_change_buffers() -> None:
    class Normed(LinearStage):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)  # type: ignore[arg-type]
            self.norm = nn.BatchNorm1d(NARROW)

        def training_step(self, batch: dict, batch_idx: int) -> Tensor:
            x = batch["x"] * (torch.inf if self.global_step in self.nan_steps else 1.0)
            self.weights.append(self.net.weight.detach().clone())
            return self.norm(self.net(x)).square().mean()

    module, reference = Normed(nan_steps=(2,)), Normed()
    fit(module, 5, SkipNonFiniteGrads())
    fit(reference, 4, SkipNonFiniteGrads())
    assert torch.equal(module.norm.running_var, reference.norm.running_var)
    assert torch.equal(module.norm.running_mean, reference.norm.running_mean)


@pytest.mark.parametrize("every_steps", [1, 4])
def test_only_many_skipped_steps_in_a_row_end_the_run(every_steps: int) -> None:
    """Even if they end before the step that logs."""
    logs = {"log_every_n_steps": every_steps}
    with pytest.raises(
        ValueError, match=r"^3 steps in a row had non-finite gradients, up to step 4"
    ):
        fit(LinearStage(nan_steps=(2, 3, 4)), 9, SkipNonFiniteGrads(max_in_a_row=3), **logs)
    recovering = LinearStage(nan_steps=(1, 2, 4, 5, 7))
    fit(recovering, 9, SkipNonFiniteGrads(max_in_a_row=3), **logs)
    assert recovering.logged["train/skipped_steps"][-1] == 5


@pytest.mark.slow
def test_a_run_that_diverges_names_its_last_checkpoint(
    cascade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    loss = StageC.loss

    def nan_loss(stage: StageC, *tensors: Tensor) -> Tensor:
        return loss(stage, *tensors) * (torch.nan if stage.global_step >= 2 else 1.0)

    monkeypatch.setattr(StageC, "loss", nan_loss)
    overrides = [*arguments(cascade, tmp_path), "callbacks.skip_nonfinite.max_in_a_row=2"]
    overrides.append("trainer.log_every_n_steps=1")
    assert run_program("train", overrides) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    newest = load.find_checkpoint(tmp_path / "default/c")
    assert f"the last checkpoint is {newest}" in error
    assert "Lower stage.optimizer.lr" in error
    assert all(v.isfinite().all() for v in load.read_checkpoint(newest)["state_dict"].values())


def test_logged_norms_are_those_of_the_weights_and_their_update() -> None:
    module = LinearStage(lr=0.25, momentum=0.0)
    fit(module, 3, WeightNormMonitor(every_steps=4))
    update = module.weights[2] - module.weights[1]
    norm = module.weights[2].norm()
    assert module.logged["train/param_norm"] == pytest.approx([float(norm)])
    assert module.logged["train/update_ratio"] == pytest.approx([float(update.norm() / norm)])


class Scheduled(LinearStage):
    """With a schedule of which the factor is 0.01 at the end, as in a cosine decay."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1.0 if n < 4 else 0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


@pytest.mark.parametrize(
    ("ratio", "advice"), [(1e-1, "lower"), (1e-3, None), (1e-4, None), (1e-6, "raise")]
)
def test_an_unusual_update_ratio_is_warned_of_once_with_the_key(
    ratio: float, advice: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the schedule makes of the learning rate."""

    def scaled_step(parameters: Any) -> torch.optim.Optimizer:
        """Every update is ``ratio`` times the norm of the weights, at the full rate."""
        optimizer = torch.optim.SGD(parameters, lr=ratio)
        optimizer.register_step_pre_hook(lambda *_: follow_weights(optimizer))
        return optimizer

    def follow_weights(optimizer: torch.optim.Optimizer) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = p.detach().clone()

    fit(Scheduled(optimizer=scaled_step), 12, WeightNormMonitor(every_steps=2))
    records = (r for r in caplog.records if r.name.startswith("wuerstchen_pl"))
    warned = [record.getMessage() for record in records]
    assert len(warned) == (advice is not None)
    if advice:
        assert f"{advice} stage.optimizer.lr={ratio:g}" in warned[0]


@pytest.mark.parametrize(
    ("losses", "warns"),
    [
        ([1.0] * 30, True),
        ([1.0 + i / 100 for i in range(30)], True),
        ([1.0 - i / 100 for i in range(30)], False),
        ([2.0, 1.5, 1.2, *[0.9, 1.1] * 14], False),
        ([1.0] * 15, False),  # too short to judge
    ],
)
def test_a_loss_that_has_not_moved_is_warned_of(
    losses: list[float], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    callback, module = LossTrend(), LinearStage()
    trainer: Any = SimpleNamespace(global_step=0, log_every_n_steps=2, is_global_zero=True)
    callback.on_train_start(trainer, module)
    for number, loss in enumerate(losses):
        for step in (2 * number + 1, 2 * number + 2):
            trainer.global_step, trainer.callback_metrics = step, {"train/loss": loss}
            for micro_batch in range(2):
                callback.on_train_batch_end(trainer, module, None, None, micro_batch)
    assert callback._losses == losses
    callback.on_train_end(trainer, module)
    warned = [record.getMessage() for record in caplog.records]
    assert [("train/loss has not moved" in w, "stage.optimizer.lr" in w) for w in warned] == [
        (True, True)
    ] * warns


def test_throughput_and_data_wait_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    class Slow(LinearStage):
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
    callback = Throughput(every_steps=4)
    fit(module, 9, callback, data=Loader())
    assert module.logged["speed/data_wait"] == pytest.approx([0.75, 0.75])
    assert module.logged["speed/samples_per_second"] == pytest.approx([ROWS / 4] * 2)
    assert callback._flops_per_sample == 3 * 2 * WIDE * NARROW


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
def test_the_peak_rate_is_looked_up_by_device_name(name: str, peak: int | None) -> None:
    assert peak_tflops(name) == peak


def test_timestep_bins_sum_losses_and_are_reset() -> None:
    bins = TimestepBins()
    bins.add(torch.tensor([0.001, 0.05, 0.55]), torch.tensor([1.0, 3.0, 5.0]))
    bins.add(torch.tensor([1.0, 0.95]), torch.tensor([7.0, 9.0]))
    sums, counts = bins.pop()
    assert sums.tolist() == [4, 0, 0, 0, 0, 5, 0, 0, 0, 16]
    assert counts.tolist() == [2, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert bins.pop().sum() == 0
    bins.add(torch.tensor([0.05, 0.06]), torch.tensor([torch.inf, 2.0]))
    sums, counts = bins.pop()
    assert (float(sums[0]), float(counts[0])) == (2, 1)  # non-finite losses are ignored


def test_the_loss_over_t_is_logged_and_plotted(tmp_path: Path) -> None:
    module = LinearStage()
    module.timestep_bins = TimestepBins()
    training_step = module.training_step

    def step_with_bins(batch: dict, batch_idx: int) -> Tensor:
        module.timestep_bins.add(torch.tensor([0.31, 0.97]), torch.tensor([2.0, 4.0 + batch_idx]))
        return training_step(batch, batch_idx)

    module.training_step = step_with_bins  # type: ignore[method-assign]
    callback = LossByTimestep(folder=str(tmp_path), every_steps=2)
    fit(module, 4, callback)
    assert module.logged["train/loss_t0.35"] == [2, 2]
    assert module.logged["train/loss_t0.95"] == [4.5, 6.5]
    assert "train/loss_t0.05" not in module.logged
    assert (tmp_path / "loss_by_timestep.png").is_file()
    resumed = LossByTimestep(folder=str(tmp_path), every_steps=2)
    resumed.load_state_dict(callback.state_dict())
    assert [step for step, _ in resumed.readings] == [2, 4]


def test_the_plot_shows_the_newest_reading_darkest() -> None:
    means = [1.0 - 0.09 * i for i in range(10)]
    (axes,) = plot_losses([(500, [m / 2 for m in means]), (1000, means)]).axes
    older, newest = axes.lines
    assert older.get_ydata() == pytest.approx([m / 2 for m in means])
    assert newest.get_ydata() == pytest.approx(means)
    assert newest.get_xdata() == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    assert (older.get_alpha() or 1) < (newest.get_alpha() or 1) == 1


def test_the_throughput_clock_stops_during_validation() -> None:
    callback = Throughput()
    callback._reset()
    start = callback._since
    callback.on_validation_start(None, None)  # type: ignore[arg-type]
    time.sleep(0.05)
    callback.on_validation_end(None, None)  # type: ignore[arg-type]
    assert callback._since - start >= 0.05


def test_a_step_profile_is_per_sample_and_has_no_side_effects() -> None:
    class WithFrozen(LinearStage):
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

    module = WithFrozen()
    module.trainer = L.Trainer(accelerator="cpu", logger=False)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    torch.manual_seed(3)
    profile = step_profile.profile_step(module, next(batches(1)))
    random_after_profile = torch.rand(())
    torch.manual_seed(3)
    assert random_after_profile == torch.rand(())
    assert profile.flops_per_sample == 2 * WIDE * WIDE + 3 * 2 * WIDE * NARROW
    assert module.logged == {}
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_the_memory_estimate_counts_the_bytes_of_tensors() -> None:
    module, batch = LinearStage(), next(batches(1))
    module.trainer = L.Trainer(accelerator="cpu", logger=False)
    module.frozen.register("wide", nn.Linear(WIDE, WIDE, bias=False))
    module.ema = EMA(decay=0.9)
    weights = 4 * WIDE * NARROW
    adam = torch.optim.AdamW(module.parameters())
    needed = estimate_bytes(module, adam, batch)
    # saved for the backward pass: x, and the output of the linear map
    saved = ROWS * 4 * (WIDE + NARROW)
    assert needed.pop("activations") == pytest.approx(saved, abs=ROWS * 16)
    assert needed == {
        "weights": weights, "frozen networks": 4 * WIDE * WIDE, "gradients": weights,
        "optimizer": 2 * weights, "ema": weights,
    }  # fmt: skip
    module.ema = EMA(decay=0.9, device="cpu")
    assert estimate_bytes(module, torch.optim.SGD(module.parameters()), batch)["ema"] == 0


@pytest.mark.parametrize(("overrides", "code"), [([], 1), (["check_memory=false"], 0)])
def test_a_run_that_cannot_fit_is_refused_before_its_first_step(
    overrides: list[str], code: int, cascade: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(memory_estimate, "device_memory", lambda *_: 1000)
    usual = [key for key in arguments(cascade, tmp_path) if key not in NO_PROFILE]
    assert run_program("train", [*usual, *overrides]) == code
    stderr = capsys.readouterr().err
    assert "memory, GB of 0.0: weights" in stderr
    assert ("or check_memory=false to try it" in stderr) == bool(code)


@pytest.mark.parametrize(("share", "checkpointed"), [(0.98, True), (1.2, False)])
def test_activations_are_checkpointed_only_if_the_batch_needs_it_to_fit(
    share: float, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``share``: the memory of the device, relative to what the batch takes without it."""
    stage = STAGES["c"]()
    stage.trainer = L.Trainer(accelerator="cpu", logger=False)
    optimizer = torch.optim.SGD(stage.parameters())
    stage.trainer.strategy.optimizers = [optimizer]
    batch: Any = {"semantic": torch.randn(4, 16, 4, 4), "caption": list("abcd")}
    plain = estimate_bytes(stage, optimizer, batch)
    monkeypatch.setattr(memory_estimate, "device_memory", lambda *_: share * sum(plain.values()))
    forwards = [block.forward for block in find_blocks(stage)]
    callback = memory_estimate.MemoryEstimate(activation_checkpointing="auto")
    callback.on_train_batch_start(stage.trainer, stage, batch, 0)
    changed = [a != b.forward for a, b in zip(forwards, find_blocks(stage), strict=True)]
    assert changed == [checkpointed] * len(changed)
    activations = estimate_bytes(stage, optimizer, batch)["activations"]
    assert (activations < 0.7 * plain["activations"]) == checkpointed


@pytest.mark.parametrize(("excess", "fitting"), [(0.5, 2), (1.5, 2), (2.5, 1), (3.5, None)])
def test_the_error_suggests_the_largest_batch_that_fits_with_the_same_global_batch(
    excess: float, fitting: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For steps of 2 batches of 4 samples, with ``excess`` samples too many for the memory."""
    module = LinearStage()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=2)
    batch = next(batches(1))
    optimizer = torch.optim.AdamW(module.parameters())
    module.trainer.strategy.optimizers = [optimizer]
    bytes_per_sample = step_profile.profile_step_once(module, batch).saved_bytes_per_sample
    needed = sum(estimate_bytes(module, optimizer, batch).values())
    available = needed - excess * bytes_per_sample
    monkeypatch.setattr(memory_estimate, "device_memory", lambda *_: available)
    advice = f"set data.batch_size={fitting} global_batch=8, " if fitting else "set "
    with pytest.raises(ValueError, match=f"{advice}activation_checkpointing=true"):
        memory_estimate.MemoryEstimate().on_train_batch_start(module.trainer, module, batch, 0)


@pytest.mark.parametrize(
    ("ema", "overrides"),
    [
        (EMA(decay=0.9999), ["device=cpu", "every_steps=100", "decay=0.99"]),
        (EMA(decay=0.999, every_steps=10), ["device=cpu", "every_steps=100", "decay=0.99"]),
        (EMA(decay=0.9, every_steps=100), ["device=cpu"]),
        (EMA(decay=0.9, device="cpu"), []),
    ],
)
def test_ema_weights_in_host_memory_are_suggested_with_rare_updates(
    ema: EMA, overrides: list[str]
) -> None:
    """Every update copies all weights; the average has the same time constant."""
    module = LinearStage()
    module.ema = ema
    assert memory_estimate.ema_on_host(module).split() == [f"stage.ema.{o}" for o in overrides]


def test_first_rows_of_a_cached_batch_slice_only_per_sample_keys() -> None:
    batch = {"semantic": torch.ones(2, 16, 3, 3), "caption": ["a", "b"], "size": (128, 96),
             "text": torch.ones(2, 7, 4), "empty_text": torch.ones(1, 7, 4)}  # fmt: skip
    one = step_profile.first_rows(batch, 1)
    assert one["size"] == (128, 96)
    assert [len(one[k]) for k in ("semantic", "caption", "text", "empty_text")] == [1, 1, 1, 1]
