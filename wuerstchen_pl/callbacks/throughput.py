"""Training throughput, data wait, and cost in GPU-hours, energy and CO2."""

import time
from collections.abc import Iterable

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.step_profile import profile_step_once

PEAK_TFLOPS = {
    "A100": 312, "H100": 989, "H200": 989, "B200": 2250, "A10": 125, "A40": 150, "L4": 121,
    "L40": 181, "L40S": 362, "V100": 112, "RTX 3090": 71, "RTX 4090": 165,
}  # fmt: skip
"""Peak dense bfloat16 (V100: float16) rate of a device in 1e12 FLOP/s, from its data sheet."""


class Throughput(L.Callback):
    """Log training speed and cost over all processes.

    Logs ``speed/samples_per_second``; ``speed/data_wait``, the fraction of time spent waiting for
    data; ``speed/mfu``, the fraction of the devices' peak rate if it is known, with the operations
    per sample of the first batch, including frozen networks; ``cost/gpu_hours``; ``cost/kwh``, if
    the devices measure their power; and the resulting ``cost/kg_co2``.

    Args:
        every_steps: steps between two logs.
        kg_co2_per_kwh: carbon intensity of the electricity. The paper's 2,276 kg CO2 for 24,602
            A100-hours at 250 W are 0.37 kg per kWh.
    """

    def __init__(self, *, every_steps: int = 50, kg_co2_per_kwh: float = 0.37) -> None:
        if every_steps < 1 or kg_co2_per_kwh < 0:
            raise ValueError(
                f"every_steps={every_steps} and kg_co2_per_kwh={kg_co2_per_kwh} are out of range; "
                "use 1 or more, and 0 or more"
            )
        self.every_steps, self.kg_co2_per_kwh = every_steps, kg_co2_per_kwh
        self.hours = 0.0
        self.kwh = 0.0
        self._flops_per_sample: float | None = None
        self._excluded_seconds = 0.0
        self._warm = False
        self._logged_step = 0
        self._reset()

    def _reset(self) -> None:
        self._samples, self._waited = 0, 0.0
        self._since = self._batch_ended = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        """The hours and energy so far, for the checkpoint."""
        return {"hours": self.hours, "kwh": self.kwh}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the hours and energy."""
        self.hours, self.kwh = state_dict["hours"], state_dict["kwh"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._warm = False
        self._reset()
        self._counted_until = self._since

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Measure the wait for data; count the operations of the first batch."""
        # Checkpoints and evaluation are neither training nor waiting for data.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        total = sum((float(getattr(callback, "seconds", 0)) for callback in callbacks), 0.0)
        excluded = total - self._excluded_seconds
        self._since += excluded
        self._waited += time.perf_counter() - self._batch_ended - excluded
        self._excluded_seconds = total
        if self._flops_per_sample is None:
            self._flops_per_sample = profile_step_once(pl_module, batch).flops_per_sample

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: STEP_OUTPUT,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Count samples, and log every ``every_steps`` steps."""
        if not self._warm:
            self._warm = True
            self._reset()  # the first batch includes the start of workers and kernels
            return
        self._samples += len(batch["caption"])
        self._batch_ended = time.perf_counter()
        step = trainer.global_step
        if step % self.every_steps == 0 and step != self._logged_step:
            self._logged_step = step
            pl_module.log_dict(self._metrics(trainer, pl_module.device), rank_zero_only=True)
            self._reset()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock during validation."""
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restart the clock after validation."""
        duration = time.perf_counter() - self._validation_start
        self._since += duration
        self._batch_ended += duration

    def _metrics(self, trainer: L.Trainer, device: torch.device) -> dict[str, float]:
        now = time.perf_counter()
        seconds = now - self._since
        rate = self._samples / seconds  # of one process
        metrics = {
            "speed/samples_per_second": rate * trainer.world_size,
            "speed/data_wait": self._waited / seconds,
        }
        if device.type == "cuda":
            # cost includes validation and saving
            elapsed, self._counted_until = now - self._counted_until, now
            self.hours += elapsed / 3600 * trainer.world_size
            metrics["cost/gpu_hours"] = self.hours
            peak = peak_tflops(torch.cuda.get_device_name(device))
            if peak and self._flops_per_sample:
                metrics["speed/mfu"] = rate * self._flops_per_sample / (peak * 1e12)
            if watts := power_draw([device]):
                self.kwh += watts * trainer.world_size * elapsed / 3.6e6
                metrics["cost/kwh"] = self.kwh
                metrics["cost/kg_co2"] = self.kwh * self.kg_co2_per_kwh
        return metrics


def peak_tflops(name: str) -> int | None:
    """The peak rate of a device in 1e12 FLOP/s, by its name; None if it is unknown."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for model, peak in PEAK_TFLOPS.items() if f" {model} " in words), None)


def power_draw(devices: Iterable[torch.device]) -> float:
    """The current power of GPUs in watts; 0 if it cannot be measured."""
    try:
        return sum(torch.cuda.power_draw(device) for device in devices) / 1000
    except Exception:  # such as NVML's errors; NVML is optional
        return 0.0
