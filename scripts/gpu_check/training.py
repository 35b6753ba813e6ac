"""Time training steps of a stage with Lightning's trainer, as ``train`` runs them."""

import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import hydra
import lightning as L
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from scripts.gpu_check import synthetic
from scripts.gpu_check.rows import Row, at_most, failed, within
from scripts.gpu_check.sizes import Size
from scripts.gpu_check.syncs import SyncRecorder, sync_row
from scripts.timing import hardware, wait_for_gpu
from wuerstchen_pl.callbacks.memory_estimate import estimate_bytes
from wuerstchen_pl.callbacks.step_profile import profile_step_once
from wuerstchen_pl.callbacks.throughput import peak_tflops
from wuerstchen_pl.distributed.launch import resolve_device
from wuerstchen_pl.models.activations import checkpoint_activations
from wuerstchen_pl.models.wrapping import compile_blocks

WARM_UP = 3
"""Training steps before the timed ones."""
GB = 1e9
TOLERANCE = 0.1
"""Largest relative difference of the memory estimate."""


class Mode(NamedTuple):
    """How a stage is trained."""

    rows: int
    """Samples in a batch."""
    compiled: bool = False
    checkpointed: bool = False
    sharded: bool = False
    """FSDP on one process."""

    def __str__(self) -> str:
        words = [name for name in ("compiled", "checkpointed", "sharded") if getattr(self, name)]
        return f"{' and '.join(words) or 'eager'}, batch {self.rows}"


class Measurement(NamedTuple):
    """Cost of a training step."""

    seconds: float
    first_seconds: float
    """Until the end of the first step, with compilation."""
    samples_per_second: float
    flops: float
    """Operations per second; a multiply-add is two, and a backward pass two forward passes."""
    peak_bytes: int
    """Largest allocation in a step; 0 on a CPU."""
    estimated_bytes: int
    """``MemoryEstimate``'s figure."""
    graphs: int
    """Graphs that Dynamo compiled."""
    syncs: Counter[str] | None
    """Line -> number of waits for the GPU in one step."""


class StepMeter(L.Callback):
    """Measure the time and the largest allocation of ``steps`` steps after ``WARM_UP`` ones."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.first_seconds = self.seconds = 0.0
        self.peak_bytes = self.estimated_bytes = 0
        self.flops_per_sample = 0.0
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At the first batch, estimate the memory and count the operations."""
        if batch_idx == 0:
            needed = estimate_bytes(pl_module, trainer.optimizers[0], batch)
            self.estimated_bytes = sum(needed.values())
            self.flops_per_sample = profile_step_once(pl_module, batch).flops_per_sample
            self._start = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Read the clock after the first step, and around the timed ones."""
        done = batch_idx + 1
        if done not in (1, WARM_UP, WARM_UP + self.steps):
            return
        wait_for_gpu()
        elapsed = time.perf_counter() - self._start
        if done == 1:
            self.first_seconds = elapsed
        elif done == WARM_UP:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self._start = time.perf_counter()
        else:
            self.seconds = elapsed / self.steps
            self.peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def measure(name: str, mode: Mode, size: Size, callbacks: Sequence[L.Callback] = ()) -> Measurement:
    """Train Stage B or C for a few steps.

    Raises:
        torch.OutOfMemoryError: if the batch does not fit.
        torch._dynamo.exc.FailOnRecompileLimitHit: if compiled blocks would run eagerly.
    """
    torch.set_float32_matmul_precision("high")  # as in ``train``
    torch._dynamo.reset()
    counters.clear()
    with resolve_device():
        build = synthetic.build_stage_b if name == "b" else synthetic.build_stage_c
        stage: Any = build(size)
        batch = synthetic.random_batch(stage, size, mode.rows)
    if mode.checkpointed:
        checkpoint_activations(stage)
    if mode.compiled:
        compile_blocks(stage)
    meter, recorder = StepMeter(size.timed_steps), SyncRecorder(step=WARM_UP + size.timed_steps)
    trainer = build_trainer(name, mode, size, [meter, *callbacks, recorder])
    # one step for the recorder, and one whose start ends the recording
    batches = [batch] * (WARM_UP + size.timed_steps + 2)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer.fit(stage, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    rate = mode.rows / meter.seconds
    return Measurement(
        seconds=meter.seconds,
        first_seconds=meter.first_seconds,
        samples_per_second=rate,
        flops=rate * meter.flops_per_sample,
        peak_bytes=meter.peak_bytes,
        estimated_bytes=meter.estimated_bytes,
        graphs=counters["stats"]["unique_graphs"],
        syncs=recorder.lines,
    )


def build_trainer(name: str, mode: Mode, size: Size, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """The trainer of ``train``'s configuration, with these callbacks and without logs."""
    cuda = torch.cuda.is_available()
    cfg = synthetic.compose(
        name, size,
        f"trainer={'fsdp' if mode.sharded else 'auto'}",
        "trainer.devices=1",
        f"trainer.accelerator={'gpu' if cuda else 'cpu'}",
        f"trainer.precision={'bf16-mixed' if cuda else '32-true'}",
        f"trainer.max_steps={WARM_UP + size.timed_steps + 2}",
        "trainer.log_every_n_steps=1000",
    )  # fmt: skip
    return hydra.utils.instantiate(
        cfg.trainer, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, _convert_="all",
    )  # fmt: skip


def measure_or_fail(
    name: str, mode: Mode, size: Size, callbacks: Sequence[L.Callback] = ()
) -> Measurement | Row:
    """``measure``, or a row that says why the mode does not run; memory is freed either way."""
    try:
        return measure(name, mode, size, callbacks)
    except (torch.OutOfMemoryError, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        return failed(f"Stage {name.upper()}, {mode}", error)
    finally:
        gc.collect()  # the trainer and the stage refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def measurement_rows(name: str, mode: Mode, size: Size, cost: Measurement) -> Iterator[Row]:
    """The speed of a mode, and what is expected of its memory, compilation and synchronization."""
    what = f"Stage {name.upper()}, {mode}"
    speed = f"{cost.seconds * 1e3:.1f} ms, {cost.samples_per_second:.1f} samples/s"
    if peak := peak_tflops(hardware()):
        speed += f", MFU {cost.flops / (peak * 1e12):.1%}"
    if mode.compiled:
        speed += f", first step {cost.first_seconds:.1f} s"
    yield Row(what, speed)
    yield from memory_rows(what, mode, cost)
    if mode.compiled:
        yield Row(f"{what}: graphs", str(cost.graphs), "more than 0", cost.graphs > 0)
    yield sync_row(f"{what}: lines that wait for the GPU", cost.syncs)


def memory_rows(what: str, mode: Mode, cost: Measurement) -> Iterator[Row]:
    """The peak beside the estimate, which is of eager code; compiled code may need less."""
    if not cost.peak_bytes:
        return
    name = f"{what}: peak of {cost.peak_bytes / GB:.1f} GB relative to the estimate"
    ratio = cost.peak_bytes / cost.estimated_bytes
    if mode.compiled:
        yield at_most(name, ratio, 1 + TOLERANCE, "{:.3f}")
    else:
        yield within(name, ratio, TOLERANCE)
