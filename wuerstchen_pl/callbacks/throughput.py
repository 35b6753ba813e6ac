"""How fast a run trains, what it waits for, and what it costs: hours, energy and carbon dioxide."""

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
"""Dense bfloat16 (V100: float16) products of a device in 1e12 a second, from its data sheet."""


class Throughput(L.Callback):
    """Log the rate of training and its cost, of all processes together.

    ``speed/samples_per_second``; ``speed/data_wait``, the share of the time that went by between
    two batches; ``speed/mfu``, the share of the devices' peak rate, where that is known, with the
    operations of the first sample, frozen networks included; ``cost/gpu_hours``;
    ``cost/kwh``, from the devices' own meters, where they have them; and ``cost/kg_co2`` of that.

    Args:
        every_steps: steps between two that are logged.
        kg_co2_per_kwh: of the electricity. The paper's 2,276 kg CO2 in 24,602 hours at 250 W an
            A100 are 0.37 kg a kWh.
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
        self._saved = 0.0
        self._warm = False
        self._logged_step = 0
        self._forget()

    def _forget(self) -> None:
        self._samples, self._waited = 0, 0.0
        self._since = self._batch_ended = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        """Hours and energy, for the checkpoint."""
        return {"hours": self.hours, "kwh": self.kwh}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the sums."""
        self.hours, self.kwh = state_dict["hours"], state_dict["kwh"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._warm = False
        self._forget()
        self._counted_until = self._since

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Note for how long the data were waited for; count the operations of the first batch."""
        # by checkpoints and evaluation
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        saving = sum((float(getattr(each, "seconds", 0)) for each in callbacks), 0.0)
        self._since += saving - self._saved  # which is neither training nor waiting
        self._waited += time.perf_counter() - self._batch_ended - (saving - self._saved)
        self._saved = saving
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
        """Count, and log now and then."""
        if not self._warm:
            self._warm = True
            self._forget()  # the first batch also waits for the workers, and for kernels
            return
        self._samples += len(batch["caption"])
        self._batch_ended = time.perf_counter()
        step = trainer.global_step
        if step % self.every_steps == 0 and step != self._logged_step:
            self._logged_step = step
            pl_module.log_dict(self._measured(trainer, pl_module.device), rank_zero_only=True)
            self._forget()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is not counted."""
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the clock resume where it stood."""
        took = time.perf_counter() - self._validation_began
        self._since += took
        self._batch_ended += took

    def _measured(self, trainer: L.Trainer, device: torch.device) -> dict[str, float]:
        now = time.perf_counter()
        seconds = now - self._since
        rate = self._samples / seconds  # of one process
        found = {
            "speed/samples_per_second": rate * trainer.world_size,
            "speed/data_wait": self._waited / seconds,
        }
        if device.type == "cuda":
            # validation and saving cost too
            cost, self._counted_until = now - self._counted_until, now
            self.hours += cost / 3600 * trainer.world_size
            found["cost/gpu_hours"] = self.hours
            peak = peak_tflops(torch.cuda.get_device_name(device))
            if peak and self._flops_per_sample:
                found["speed/mfu"] = rate * self._flops_per_sample / (peak * 1e12)
            if watts := power_draw([device]):
                self.kwh += watts * trainer.world_size * cost / 3.6e6
                found["cost/kwh"] = self.kwh
                found["cost/kg_co2"] = self.kwh * self.kg_co2_per_kwh
        return found


def peak_tflops(name: str) -> int | None:
    """The peak rate of a device in 1e12 operations a second, by the words of its name."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for known, peak in PEAK_TFLOPS.items() if f" {known} " in words), None)


def power_draw(devices: Iterable[torch.device]) -> float:
    """Watts that GPUs draw now; 0 where they cannot say."""
    try:
        return sum(torch.cuda.power_draw(device) for device in devices) / 1000
    except Exception:  # NVML's own among them, which is there to be asked or not
        return 0.0
