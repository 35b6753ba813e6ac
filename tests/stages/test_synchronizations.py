"""On a GPU, a training step never waits: the host prepares the next step during this one."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import hydra
import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from tests.cli.test_config import composed
from tests.fake_cuda import FakeCUDAStrategy, Synchronizations, reads_values
from tests.stages.conftest import STAGES, fit
from wuerstchen_pl.callbacks.step_profile import StepProfile
from wuerstchen_pl.models.fake_cuda import fake_cuda
from wuerstchen_pl.stages.stage import Batch

AT_INTERVALS = (
    *("sample_grids", "checkpoints", "run_metadata", "memory_estimate", "loss_by_timestep"),
)
"""Callbacks that do nothing in most steps, and that need values of tensors in the others."""


class LinesPerStep(L.Callback):
    """The lines that waited in each step, including the copy of its batch."""

    def __init__(self, counter: Synchronizations) -> None:
        self.counter, self.steps = counter, [Counter[str]()]

    def on_train_batch_end(self, *args: object) -> None:
        self.steps.append(self.counter.lines - sum(self.steps, Counter()))


def callbacks(stage: str) -> list[L.Callback]:
    """The callbacks of ``python -m wuerstchen_pl.train``."""
    off = [f"callbacks.{name}=null" for name in AT_INTERVALS]
    steps = ["validate_every_steps=1000", "callbacks.progress.label=steps"]
    cfg = composed(f"stage={stage}", *steps, *off)
    return [hydra.utils.instantiate(c) for c in cfg.callbacks.values() if c is not None]


def waiting_lines(name: str, batch: Batch, precision: str) -> Counter[str]:
    """The lines that wait in the second step, which does not log."""
    stage = STAGES[name]()
    profile = mock.patch(
        "wuerstchen_pl.callbacks.throughput.profile_step_once", return_value=StepProfile(1, 1, 1)
    )
    with fake_cuda(Synchronizations()) as counter, profile:
        pinned: Any = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}
        lines = LinesPerStep(counter)
        trainer = L.Trainer(
            strategy=FakeCUDAStrategy(precision), max_steps=2, logger=False,
            enable_checkpointing=False, enable_model_summary=False, gradient_clip_val=1.0,
            callbacks=[*callbacks(name), lines],
        )  # fmt: skip
        trainer.fit(stage, DataLoader([pinned] * 2, batch_size=None))
    return lines.steps[2]


@pytest.mark.filterwarnings("ignore:Total length of")  # the host reads a 1 from any tensor
@pytest.mark.parametrize(
    "precision", ["bf16-mixed", pytest.param("32-true", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "c" else pytest.mark.slow) for n in "abc"]
    + [pytest.param("ldm", marks=pytest.mark.slow)],
)
def test_no_line_of_a_training_step_waits(name: str, precision: str, batch: Batch) -> None:
    assert waiting_lines(name, batch, precision) == {}


class ValueReads(TorchDispatchMode):
    """Records the operations for which the host reads values."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if reads_values(func, args):
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["a", "b", "c", "ldm"])
def test_no_operation_of_the_backward_pass_reads_values(
    name: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, backward = ValueReads(), Tensor.backward

    def watched(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with reads:
            backward(loss, *args, **kwargs)

    monkeypatch.setattr(Tensor, "backward", watched)
    fit(STAGES[name](), batch, 1)
    assert reads.operations == []


HOST = torch.arange(3.0)
WAITS: dict[str, Callable[[Tensor], object]] = {
    "number": lambda x: x[0].item(),
    "condition": lambda x: bool((x > 0).any()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "bincount": lambda x: torch.bincount(x.long(), minlength=3),
    "to the host": lambda x: x.to("cpu", non_blocking=True),
    "pageable": lambda x: HOST.to(x.device, non_blocking=True),
    "blocking": lambda x: HOST.pin_memory().to(x.device),
    "copied in": lambda x: x.copy_(HOST),
    "constant": lambda x: torch.tensor(1.0, device=x.device),
    "index": lambda x: x[HOST.long()],
}
PASSES: dict[str, Callable[[Tensor], object]] = {
    "pinned": lambda x: HOST.pin_memory().to(x.device, non_blocking=True),
    "pinned row": lambda x: torch.empty(2, 3, pin_memory=True)[0].to(x.device, non_blocking=True),
    "copied in": lambda x: x.copy_(HOST.pin_memory(), non_blocking=True),
    "filled": lambda x: torch.full((3,), 2.0, device=x.device),
    "scalar": lambda x: x * torch.tensor(2.0),
    "selected": lambda x: torch.where(x > 0, x, 0.0)[x.long()],
    "on the host": lambda x: HOST[HOST > 1].tolist(),
}


@pytest.mark.parametrize(
    ("operation", "waits"),
    [*((f, 1) for f in WAITS.values()), *((f, 0) for f in PASSES.values())],
    ids=[*(f"{name} waits" for name in WAITS), *(f"{name} passes" for name in PASSES)],
)
def test_the_counter_finds_what_waits(operation: Callable[[Tensor], object], waits: int) -> None:
    with fake_cuda(Synchronizations()) as counter:
        operation(torch.ones(3, device="cuda:0"))
    assert sum(counter.lines.values()) == waits
