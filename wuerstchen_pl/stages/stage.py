"""What the three stages share: frozen parts, EMA, the optimizer, what a checkpoint holds."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from torch import Tensor, nn

from wuerstchen_pl.distributed.fsdp2 import shard_stage
from wuerstchen_pl.io import atomic
from wuerstchen_pl.models.wrapping import find_blocks
from wuerstchen_pl.stages.batch_rng import BatchRNG, derive_seed
from wuerstchen_pl.stages.ema import EMA

Batch = dict[str, Any]
"""``image`` (B, 3, H, W) in [0, 1], ``caption`` list[str]; or as ``data/caches/cached.py`` says."""

OptimizerFactory = Callable[[Iterable[Any]], torch.optim.Optimizer]
"""Of parameters or groups of them."""


def encode_captions(
    batch: Batch,
    encode: Callable[[Sequence[str]], Tensor | None],
    dropped: Tensor | None = None,
) -> Tensor | None:
    """The states of a batch's captions, as cached or encoded now.

    Args:
        batch: with ``caption``, and ``text`` and ``empty_text`` if they were cached.
        encode: captions -> (B, L, D) states, or None for a stage without text.
        dropped: (B,) whether the empty caption replaces this one; None drops nothing.
    """
    if dropped is None:
        dropped = torch.zeros(len(batch["caption"]), dtype=torch.bool)
    if "text" not in batch:
        return encode(["" if d else c for c, d in zip(batch["caption"], dropped, strict=True)])
    text = batch["text"]
    return torch.where(dropped.to(text.device)[:, None, None], batch["empty_text"], text)


def num_unique_samples(batch: Batch) -> int:
    """The samples of a validation batch, but for those that another process has as well."""
    return len(batch["caption"]) if batch.get("counts", True) else 0


class WarmupCosine:
    """Factor of the learning rate: linear from 0 to 1, then constant or half a cosine down to 0.

    Args:
        warmup_steps: steps until the factor is 1.
        total_steps: step at which a cosine reaches 0; None stays at 1, as the paper does.
    """

    def __init__(self, *, warmup_steps: int = 0, total_steps: int | None = None) -> None:
        self.warmup_steps, self.total_steps = warmup_steps, total_steps

    def __call__(self, step: int) -> float:
        """Steps done -> factor in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.total_steps is None:
            return 1.0
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return 0.5 * (1 + math.cos(math.pi * progress))


class Stage(L.LightningModule):
    """Base of StageA, StageB and StageC.

    A frozen part is held outside of the module registry: it follows the stage to its device and
    appears in no checkpoint, optimizer or EMA. A checkpoint names it by path and sha256.
    """

    TRAINING_ONLY: tuple[str, ...] = ("optimizer", "lr_schedule", "ema", "seed")
    """Constructor arguments that a stage which only samples does without."""

    def __init__(
        self,
        *,
        optimizer: OptimizerFactory | None,
        lr_schedule: Callable[[int], float] | None,
        ema: EMA | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.optimizer_factory = optimizer
        self.lr_schedule = lr_schedule or WarmupCosine()
        self.ema = ema or EMA(decay=0.0)
        self.seed = seed
        self.frozen: dict[str, nn.Module] = {}
        self.config: dict[str, Any] | None = None
        """The ``stage`` part of the run's config; goes into checkpoints."""
        self.source: dict[str, str] | None = None
        """``path`` and ``sha256`` of the checkpoint that this stage was loaded from."""

    # Frozen parts

    def register_frozen(self, name: str, module: nn.Module) -> None:
        """Hold ``module`` as attribute ``name``: in eval mode, gradient-free, unregistered."""
        object.__setattr__(self, name, module.eval().requires_grad_(False))
        self.frozen[name] = module

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        for module in self.frozen.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        """Where the weights lie; Lightning's own does not know of a frozen stage's moves."""
        return next(self.parameters()).device

    def configure_model(self) -> None:
        """Shard the weights if the run's strategy spreads them over processes."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None:
            shard_stage(self, find_blocks(self), mesh["data_parallel"])

    # Optimization

    @property
    def size_multiple(self) -> int:
        """Heights and widths of images must be multiples of it."""
        raise NotImplementedError

    def semantic_size(self, height: int, width: int) -> tuple[int, int] | None:
        """Semantic positions (h, w) of an image; None for a stage that knows none."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of the optimizer, each of which is clipped by its own norm."""
        return [{"params": list(self.parameters())}]

    def configure_optimizers(self) -> Any:
        """One optimizer over everything that is not frozen, and the learning rate's schedule."""
        if self.optimizer_factory is None:
            raise ValueError("stage.optimizer is missing; a stage that trains needs one")
        optimizer = self.optimizer_factory(self.parameter_groups())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then average: here, and not in a batch hook, so that no checkpoint lies between."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update(self)
        self.after_step(self.global_step + 1)

    def after_step(self, step: int) -> None:
        """What a stage does to its weights beside the optimizer, when ``step`` steps are done."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by norm, and log the norm; Lightning's own refuses fused optimizers."""
        limit = gradient_clip_val or math.inf
        for group in optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], limit)
            self.log("_".join(["train/grad_norm", *group.get("name", "").split()]), norm)

    def log_means(self, values: dict[str, Tensor]) -> None:
        """Log ``train/...``, means over processes, when logs are written: it takes time."""
        if (self.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        stacked = torch.stack([value.detach().float() for value in values.values()])
        means = self.trainer.strategy.reduce(stacked, reduce_op="mean")
        self.log_dict({f"train/{n}": m for n, m in zip(values, means, strict=True)})

    # Checkpoints

    def files(self) -> dict[str, dict[str, str]]:
        """Path and sha256 of the files that frozen parts were read from, such as CLIP's."""
        paths = {name: getattr(part, "weights", None) for name, part in self.frozen.items()}
        return {
            name: {
                "path": str(path),
                "sha256": _cached_sha256(str(path), os.stat(path).st_mtime_ns),
            }
            for name, path in paths.items()
            if path is not None and os.path.isfile(path)
        }

    def check_files(self, named: dict[str, dict[str, str]]) -> None:
        """Refuse other frozen weights than those that a checkpoint names.

        Raises:
            ValueError: naming the file and both hashes.
        """
        for name, own in self.files().items():
            wanted = named.get(name, own)["sha256"]
            if own["sha256"] != wanted:
                raise ValueError(
                    f"stage.{name}.weights={own['path']} has sha256 {own['sha256'][:12]}, and the "
                    f"checkpoint was trained with {wanted[:12]}; put that file back"
                )

    def check_optimizer(self, trained: dict[str, Any] | None) -> None:
        """Refuse to hand the moments of one optimizer to another.

        Raises:
            ValueError: naming both.
        """
        now, before = (((c or {}).get("optimizer") or {}) for c in (self.config, trained))
        if now.get("_target_") != before.get("_target_"):
            raise ValueError(
                f"stage.optimizer._target_={now.get('_target_')} cannot go on with the moments of "
                f"{before.get('_target_')}; choose that one (optimizer@stage.optimizer), or start "
                "a new run with init_from"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights, the stage's config, and the names of the frozen stages."""
        checkpoint["ema"] = self.ema.state_dict()
        checkpoint["stage"] = self.config
        checkpoint["versions"] = {name: version(name) for name in ("torch", "lightning")}
        checkpoint["files"] = self.files()
        root = self.trainer.default_root_dir
        checkpoint["frozen"] = {
            name: {**part.source, "path": os.path.relpath(part.source["path"], root)}
            for name, part in self.frozen.items()
            if isinstance(part, Stage) and part.source is not None
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averaged weights back, and refuse to go on over other frozen weights."""
        self.check_optimizer(checkpoint["stage"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.check_files(checkpoint["files"])
        for name, named in checkpoint["frozen"].items():
            source = getattr(self.frozen[name], "source", None)
            if source is not None and source["sha256"] != named["sha256"]:
                raise ValueError(
                    f"the run was started with {name} sha256 {named['sha256'][:12]}, and "
                    f"{source['path']} has {source['sha256'][:12]}; put the old weights back or "
                    "start a new run"
                )

    # Randomness

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let dropout draw by (seed, step, process), whatever drew numbers before."""
        torch.manual_seed(derive_seed(self.seed, *self._batch_of_run(batch_idx), self.global_rank))

    def batch_rng(self, rows: int, batch_idx: int) -> BatchRNG:
        """The random numbers of the present batch, in which this process has ``rows`` samples."""
        # a batch lacks what could not be read, and the next process's rows begin all the same
        of_each = getattr(getattr(self.trainer, "datamodule", None), "batch_size", rows)
        step, first_row = self._batch_of_run(batch_idx), self.global_rank * of_each
        return BatchRNG(seed=self.seed, step=step, rows=rows, first_row=first_row)

    def _batch_of_run(self, batch_idx: int) -> tuple[int, int]:
        return self.global_step, batch_idx % self.trainer.accumulate_grad_batches

    def example_grid(self, batch: Batch) -> dict[str, Tensor]:
        """Columns of a validation grid: label -> (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError


@lru_cache(maxsize=16)
def _cached_sha256(path: str, changed_at: int) -> str:
    """The sha256 of a file, read once: those of CLIP have gigabytes."""
    return atomic.sha256(Path(path))
