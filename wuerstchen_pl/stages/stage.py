"""Base of all stages: frozen networks, EMA, optimizer, validation, and checkpoints."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.batch import Batch
from wuerstchen_pl.distributed.fsdp2 import reshard, shard_stage, total_norm
from wuerstchen_pl.io.atomic import Source
from wuerstchen_pl.models.wrapping import find_blocks
from wuerstchen_pl.stages import schedule_free
from wuerstchen_pl.stages.batch_rng import BatchRNG, derive_seed
from wuerstchen_pl.stages.clipping import clip, group_gradients
from wuerstchen_pl.stages.compatibility import check_networks
from wuerstchen_pl.stages.ema import EMA
from wuerstchen_pl.stages.frozen import FrozenModules, FrozenPrecision
from wuerstchen_pl.stages.hyperparameters import apply_configured
from wuerstchen_pl.stages.lr_schedule import WarmupCosine
from wuerstchen_pl.stages.provenance import Provenance, not_in_checkpoints

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
"""Parameters or parameter groups -> optimizer."""


class Stage(L.LightningModule):
    """Base of the stages.

    A frozen network is an attribute of the stage, but is not registered as a submodule (see
    ``FrozenModules``). A checkpoint refers to it by path and sha256.
    """

    name: ClassVar[str]
    """``a``, ``b``, ``c`` or ``ldm``, as in ``stage=``."""
    TRAINING_ONLY: ClassVar[tuple[str, ...]] = ("optimizer", "lr_schedule", "ema", "seed")
    """Constructor arguments that are not needed for sampling."""
    GATHER_BFLOAT16: ClassVar[bool] = True
    """Whether FSDP gathers the blocks in bfloat16 if the precision is bf16-mixed, as autocast would
    cast their weights anyway; all other weights, such as of norms, are gathered in float32."""
    SEPARATE_LOSSES: ClassVar[bool] = False
    """Whether each parameter group has its own loss, and is clipped by its own norm."""

    def __init__(
        self,
        *,
        optimizer: OptimizerFactory | None,
        lr_schedule: Callable[[int], float] | None,
        ema: EMA | None,
        seed: int,
        frozen_precision: FrozenPrecision = "float32",
    ) -> None:
        super().__init__()
        self.optimizer_factory = optimizer
        self.lr_schedule = lr_schedule or WarmupCosine()
        self.ema = ema or EMA(decay=0.0)
        self.seed = seed
        self.frozen = FrozenModules(frozen_precision)
        self.adapters: dict[str, Adapter] = {}  # those that are trained, by network
        self.words: NewWords | None = None
        self.provenance = Provenance()
        self._validation = ExitStack()
        self._micro_batch_losses: list[Tensor] = []
        self._grad_norms: list[Tensor] | None = None

    # Frozen networks

    def __getattr__(self, name: str) -> Any:
        """The frozen network with this name; ``nn.Module`` finds parameters and submodules."""
        frozen = self.__dict__.get("frozen", {})
        return frozen[name] if name in frozen else super().__getattr__(name)

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        self.frozen.apply_to_tensors(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        """The device of the weights; Lightning's property is not updated for a frozen stage."""
        return next(self.parameters()).device

    def configure_model(self) -> None:
        """Shard the weights if the run's strategy has a device mesh."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:
            trainer: Any = self.trainer
            bf16 = self.GATHER_BFLOAT16 and trainer.precision == "bf16-mixed"
            bf16 = bf16 and not any(getattr(c, "needs_float32", False) for c in trainer.callbacks)
            shard_stage(self, find_blocks(self), mesh, block_dtype=torch.bfloat16 if bf16 else None)

    # Sizes

    @property
    def size_multiple(self) -> int:
        """Image heights and widths must be multiples of this."""
        raise NotImplementedError

    def semantic_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Semantic positions (h, w) of an image; None for a stage without semantic latents."""
        return None

    # Optimization

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer; those after the first have a ``name``."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """One optimizer over all weights that are not frozen, with the learning-rate schedule."""
        if self.optimizer_factory is None:
            raise ValueError("stage.optimizer is missing; set it to train this stage")
        with redirect_stdout(None):  # Prodigy prints that it has weight decay
            optimizer = self.optimizer_factory(self.parameter_groups())
        # A plain function: LambdaLR saves the attributes of any other callable, and restores them.
        scheduler = LambdaLR(optimizer, lambda n: self.lr_schedule(n))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Use the configured hyperparameters, which a checkpoint's optimizer state overwrites."""
        for schedule in self.trainer.lr_scheduler_configs:
            configured = self.configure_optimizers()["optimizer"]
            scheduler = cast(LambdaLR, schedule.scheduler)
            apply_configured(self.trainer.optimizers[0], scheduler, configured)
            schedule_free.prepare(self.trainer.optimizers[0])

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then update the EMA; not in a batch hook, as a checkpoint could come in between."""
        super().optimizer_step(*args, **kwargs)
        with schedule_free.averaged(self.trainer.optimizers[0]):
            self.ema.update(self)
        self.after_step(self.global_step + 1)

    def after_step(self, step: int) -> None:
        """Hook after optimizer step number ``step`` for other weight changes; does nothing here."""

    def _gradients(self, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
        groups = optimizer.param_groups
        return group_gradients(groups, separate_losses=self.SEPARATE_LOSSES)

    def gradient_norms(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """The norm of the gradients, one for each loss; computed once per step."""
        if self._grad_norms is None:
            self._grad_norms = [total_norm(g) for g in self._gradients(optimizer).values()]
        return self._grad_norms

    def discard_gradients(self) -> None:
        """Drop all gradients, so that the next optimizer step changes nothing."""
        for parameter in self.parameters():
            parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, and log the norms."""
        norms, self._grad_norms = self.gradient_norms(optimizer), None
        for (name, gradients), norm in zip(self._gradients(optimizer).items(), norms, strict=True):
            if gradient_clip_val:
                clip(gradients, norm, gradient_clip_val)
            self.log(f"train/{name}", norm)

    def log_means(self, values: dict[str, Tensor]) -> None:
        """Log ``train/...``: means over the micro-batches of a step and over processes.

        Computed only in steps for which Lightning writes logs, as the reduction takes time.
        """
        if (self.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        stacked = torch.stack([value.detach().float() for value in values.values()])
        self._micro_batch_losses.append(stacked)
        if len(self._micro_batch_losses) < self.trainer.accumulate_grad_batches:
            return
        mean = torch.stack(self._micro_batch_losses).mean(dim=0)
        self._micro_batch_losses = []
        means = self.trainer.strategy.reduce(mean, reduce_op="mean")
        self.log_dict({f"train/{n}": m for n, m in zip(values, means, strict=True)})

    def reset_step_losses(self) -> None:
        """Discard the losses of an unfinished step."""
        self._micro_batch_losses = []

    # Validation with EMA weights

    def on_validation_epoch_start(self) -> None:
        """Swap in the EMA weights, once for all validation batches."""
        self._validation.enter_context(self.ema.swapped_in(self))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the metrics of a batch; restore the raw weights if that fails."""
        try:
            self.validate(batch)
        except BaseException:
            self._validation.close()
            raise

    def validate(self, batch: Batch) -> None:
        """Log the metrics of one validation batch."""
        raise NotImplementedError

    def on_validation_epoch_end(self) -> None:
        """Restore the raw weights."""
        self._validation.close()
        reshard(self)

    def setup(self, stage: str) -> None:
        """Leave frozen networks on the CPU until they are used; cast the bases of adapters."""
        self.frozen.on_demand = True
        for name, adapter in self.adapters.items():
            adapter.cast_base(getattr(self, name))

    def teardown(self, stage: str) -> None:
        """Restore the raw weights if validation was interrupted."""
        self._validation.close()
        self.frozen.on_demand = False

    # Checkpoints

    def record_provenance(
        self, *, config: dict[str, Any] | None = None, source: Source | None = None
    ) -> None:
        """Set the config that this stage was built from, and the checkpoint it was loaded from."""
        self.provenance = Provenance(config, source)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the EMA weights and the provenance."""
        checkpoint["ema"] = self.ema.state_dict()
        callbacks = self.trainer.checkpoint_callbacks
        folders = [Path(c.folder).parent for c in callbacks if hasattr(c, "folder")]
        run_dir = (folders or [Path(self.trainer.default_root_dir)])[0]
        checkpoint |= self.provenance.record(not_in_checkpoints(self), run_dir)

    def check_checkpoint(self, checkpoint: Mapping[str, Any], *, origin: str = "ckpt") -> None:
        """Refuse a checkpoint whose networks differ from this stage's; see ``check_networks``."""
        check_networks(
            checkpoint,
            stage=self.name,
            config=self.provenance.config,
            weights=self.state_dict(),
            origin=origin,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the EMA weights; refuse to resume with other networks or frozen weights."""
        self.check_checkpoint(checkpoint)
        self.provenance.check_resume(checkpoint, not_in_checkpoints(self))
        self.ema.load_state_dict(checkpoint["ema"])

    # Randomness

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout from (seed, step, process), regardless of earlier random numbers."""
        torch.manual_seed(derive_seed(self.seed, *self._step_of(batch_idx), self.global_rank))

    def batch_rng(self, rows: int, batch_idx: int) -> BatchRNG:
        """The random numbers of the current batch, of which this process has ``rows`` samples."""
        # Row indices use the configured batch size, as a batch may lack unreadable samples.
        datamodule = getattr(self.trainer, "datamodule", None)
        first_row = self.global_rank * getattr(datamodule, "batch_size", rows)
        step = self._step_of(batch_idx)
        return BatchRNG(seed=self.seed, step=step, rows=rows, first_row=first_row)

    def _step_of(self, batch_idx: int) -> tuple[int, int]:
        """(optimizer step, micro-batch within it)."""
        return self.global_step, batch_idx % self.trainer.accumulate_grad_batches

    @property
    def can_draw(self) -> bool:
        """Whether ``example_grid`` is possible."""
        return True

    def example_grid(self, batch: Batch) -> dict[str, Tensor]:
        """Columns of a sample grid: label -> (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError
