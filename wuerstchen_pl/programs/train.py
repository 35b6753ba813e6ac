"""Train one stage."""

import logging
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from wuerstchen_pl.callbacks.config_file import ConfigFile
from wuerstchen_pl.callbacks.signals import Preempted
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.single_file import SingleFileCheckpointIO
from wuerstchen_pl.cli.jobs import check_output_dir
from wuerstchen_pl.cli.signals import INTERRUPTED, REQUEUE, Exit
from wuerstchen_pl.distributed.strategy import FSDP2Strategy
from wuerstchen_pl.formats.initial_weights import load_initial_weights
from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.io.output_folder import claimed
from wuerstchen_pl.models.activations import checkpoint_activations
from wuerstchen_pl.models.wrapping import compile_blocks
from wuerstchen_pl.plural import plural
from wuerstchen_pl.programs.base_model import use_base_model
from wuerstchen_pl.programs.dry_run import describe_memory
from wuerstchen_pl.programs.next_steps import describe_end
from wuerstchen_pl.programs.optimizer_checks import check_optimizer
from wuerstchen_pl.programs.run_length import AUTO, INTERVALS, choose_run_length
from wuerstchen_pl.programs.training_cache import with_cache
from wuerstchen_pl.stages.data_checks import (
    check_cache,
    check_control,
    check_mask,
    check_sizes,
    check_words,
    describe_sizes,
)

if TYPE_CHECKING:
    from wuerstchen_pl.data.datamodule import ImageTextDataModule
    from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Train a stage; returns the last validation loss, which a sweep minimizes."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        cfg.paths.output_dir = HydraConfig.get().runtime.output_dir
    check_ranges(cfg)
    check_optimizer(cfg, is_sharded=is_sharded(cfg))
    if cfg.dry_run:
        _silence_lightning()
        rank_zero_only(print)(describe_memory(cfg))
        return float("nan")
    use_base_model(cfg)
    output_dir = check_output_dir(cfg.paths.output_dir, "paths.output_dir")
    resume = find_resume(cfg.ckpt, output_dir)
    data: ImageTextDataModule = hydra.utils.instantiate(cfg.data, _convert_="all")
    choose_run_length(cfg, data)
    if resume is not None and load.parse_step(resume) >= cfg.trainer.max_steps >= 0:
        logger.info("%s is already finished at step %d", output_dir, load.parse_step(resume))
        return float("nan")
    _silence_lightning()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")

    stage = build_stage(cfg)
    check_control(stage, data, cache=cfg.cache)
    if cfg.cache:
        data = with_cache(cfg, stage, data)
    if cfg.activation_checkpointing is True:
        checkpoint_activations(stage)
    if cfg.compile:
        compile_blocks(stage)
        if (teacher := stage.frozen.get("teacher")) is not None:
            compile_blocks(teacher)
    check_schedule(stage.lr_schedule, cfg.trainer.max_steps)
    check_sizes(stage, data)
    check_cache(stage, data)
    check_mask(stage, data)
    rank_zero_only(print)(describe_sizes(stage, data))
    trainer = build_trainer(cfg)
    rank_zero_only(data.prepare_data)()  # before the folder is created, in case data are missing
    with claimed(output_dir, key="paths.output_dir", is_owner=trainer.is_global_zero):
        fit(trainer, stage, data, resume, output_dir)
    end = describe_end(
        output_dir,
        stage.name,
        HydraConfig.get().overrides.task,
        caption=data.captions.plain(data.splits.first_window["train"][0].captions[0]),
        default_folder=Path(cfg.paths.root, cfg.name, stage.name),
        is_cached=hasattr(data, "made_with") and not cfg.cache,
        has_controlnet=hasattr(stage, "controlnet"),
        student_steps=getattr(stage, "student_steps", None),
    )
    rank_zero_only(print)(end)
    return float(trainer.callback_metrics.get("val/loss", torch.tensor(torch.nan)))


def fit(
    trainer: L.Trainer,
    stage: "Stage",
    data: L.LightningDataModule,
    resume: Path | None,
    output_dir: Path,
) -> None:
    """Train until ``max_steps``.

    Raises:
        Exit: if training was interrupted.
        InvalidContents: if the checkpoint ``resume`` lacks something, or it has another type.
    """
    first_batch = Event()
    trainer.callbacks.append(  # type: ignore[attr-defined]
        LambdaCallback(
            on_fit_start=lambda *_: check_words(stage, data),
            on_train_batch_start=lambda *_: first_batch.set(),
        )
    )
    try:
        trainer.fit(stage, data, ckpt_path=resume, weights_only=True)
    except Preempted as stop:
        code = INTERRUPTED if stop.signum == signal.SIGINT else REQUEUE
        raise Exit(
            f"{output_dir} was stopped by {stop} after step {trainer.global_step}; a checkpoint "
            "was saved, and the same command with ckpt=auto resumes it",
            code,
        ) from None
    except Exit:  # before the first step, when Lightning may not stop the processes it started
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        raise
    except SystemExit:  # Lightning raises it for a Ctrl-C that SignalHandler did not defer
        raise Exit(
            f"{output_dir} was interrupted at step {trainer.global_step}; ckpt=auto resumes from "
            "its last checkpoint",
            INTERRUPTED,
        ) from None
    except (AttributeError, LookupError, TypeError):  # Lightning does not check what it restores
        if resume is None or first_batch.is_set():
            raise
        with contents_of(resume, "use another checkpoint"):
            raise
    finally:  # Lightning skips it after an error, and workers would keep opening shards
        data.teardown("fit")


def build_trainer(cfg: DictConfig) -> L.Trainer:
    """The trainer of a config, with its callbacks, loggers and gradient accumulation."""
    trainer: L.Trainer = hydra.utils.instantiate(
        cfg.trainer,
        callbacks=[*_instantiate_group(cfg.callbacks), ConfigFile(cfg)],
        logger=_instantiate_group(cfg.logger),
        plugins=None if is_sharded(cfg) else [SingleFileCheckpointIO()],
        _convert_="all",
    )
    if cfg.global_batch is not None:
        trainer.accumulate_grad_batches = accumulation(
            cfg.global_batch, cfg.data.batch_size, trainer.world_size
        )
    # Lightning counts batches; validate_every_steps counts optimizer steps.
    trainer.val_check_interval *= trainer.accumulate_grad_batches
    return trainer


def is_sharded(cfg: DictConfig) -> bool:
    """Whether the weights are sharded over the processes."""
    target = OmegaConf.select(cfg, "trainer.strategy._target_")
    return target is not None and issubclass(hydra.utils.get_class(target), FSDP2Strategy)


def _instantiate_group(group: DictConfig) -> list[Any]:
    """The objects of a config group; null entries are skipped."""
    configs = [config for config in group.values() if config is not None]
    return [hydra.utils.instantiate(config, _convert_="all") for config in configs]


def build_stage(cfg: DictConfig) -> "Stage":
    """The stage of a config, with the weights of ``init_from`` if it is set."""
    stage: Stage = hydra.utils.instantiate(cfg.stage, _convert_="all")
    config: Any = OmegaConf.to_container(cfg.stage, resolve=True)
    stage.record_provenance(config=config)
    if cfg.init_from is not None:
        load_initial_weights(stage, cfg.init_from, allow_mismatch=cfg.allow_mismatch)
    return stage


def check_ranges(cfg: DictConfig) -> None:
    """Refuse values that would otherwise fail only once training has begun.

    Raises:
        ValueError: naming the key, its value and the fix.
    """
    precision = str(cfg.trainer.precision)
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f"trainer.precision={precision} overflows or mixes types in these networks; use "
            "bf16-mixed or 32-true"
        )
    for name in ("adapter", "text_adapter"):
        base_dtype = OmegaConf.select(cfg, f"stage.{name}.base_dtype")
        if base_dtype == "bfloat16" and precision != "bf16-mixed":
            raise ValueError(
                f"stage.{name}.base_dtype=bfloat16 needs trainer.precision=bf16-mixed, not "
                f"{precision}; set it, or stage.{name}.base_dtype=float32"
            )
    needs_gpu = cfg.trainer.accelerator in ("gpu", "cuda") and not cfg.dry_run
    if needs_gpu and not torch.cuda.is_available():
        raise ValueError(
            f"trainer.accelerator={cfg.trainer.accelerator} finds no GPU that torch can use; "
            "use trainer.accelerator=cpu, or fix the driver"
        )
    for key in INTERVALS:
        if cfg[key] != AUTO and cfg[key] < 1:
            raise ValueError(f"{key}={cfg[key]} is out of range; use 1 or more")


def check_schedule(factor: Callable[[int], float], max_steps: int) -> None:
    """Refuse a schedule whose learning rate is 0 before the last step.

    Args:
        factor: step -> factor on the learning rate.
        max_steps: number of steps; -1 is unlimited.

    Raises:
        ValueError: naming the key and the fix.
    """
    last_step = max_steps - 1 if max_steps > 0 else 10**12
    if max_steps != 0 and factor(last_step) <= 0:
        raise ValueError(
            f"stage.lr_schedule reaches a learning rate of 0 before trainer.max_steps={max_steps}; "
            "set stage.lr_schedule.total_steps to trainer.max_steps, or "
            "stage.lr_schedule.decay=none for a constant rate"
        )


def find_resume(ckpt: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from; None starts a new run.

    Raises:
        FileNotFoundError: if there is no checkpoint at ``ckpt``.
        ValueError: if ``output_dir`` already contains a run and ``ckpt`` is None.
    """
    has_run = any(output_dir.glob("checkpoints/step*.ckpt"))
    if ckpt == "auto":
        return load.find_checkpoint(output_dir) if has_run else None
    if ckpt is not None:
        return load.find_checkpoint(ckpt)
    if has_run:
        raise ValueError(
            f"paths.output_dir={output_dir} already contains a run; resume it with ckpt=auto, or "
            "choose another paths.output_dir or name"
        )
    return None


def accumulation(global_batch: int, batch_size: int, processes: int) -> int:
    """Number of batches that each process accumulates for a step of ``global_batch`` samples.

    Raises:
        ValueError: if it is not an integer.
    """
    samples_at_once = batch_size * processes
    if global_batch < 1 or global_batch % samples_at_once:
        raise ValueError(
            f"global_batch={global_batch} is not a multiple of {samples_at_once} "
            f"(data.batch_size={batch_size} on {plural(processes, 'process')}); set "
            f"data.batch_size to a divisor of {global_batch / processes:g}"
        )
    return global_batch // samples_at_once


def _silence_lightning() -> None:
    """Silence Lightning's advice that is already followed, or that does not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        "does not have many workers",
        "Be aware that when using `ckpt_path`",
        "Checkpoint directory",
        "Total length of `OnceLoader` across ranks is zero",
        "You are trying to `self",
        "treespec",
        "It is recommended to use `self",
        "in eval mode at the start",  # frozen base models, without dropout
        "Grad strides do not match bucket",
        "is smaller than the logging interval",  # batches of an epoch; steps are logged
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
