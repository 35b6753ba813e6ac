"""Train one stage: ``python -m wuerstchen_pl.train stage=a|b|c|ldm experiment=...``."""

import logging
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from wuerstchen_pl.callbacks.preemption import Preempted
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.checkpointing.single_file import SingleFileCheckpointIO
from wuerstchen_pl.cli import Exit, check_output_dir, command
from wuerstchen_pl.config import check_config
from wuerstchen_pl.distributed.strategy import FSDP2Strategy
from wuerstchen_pl.models.fingerprint import encoder_fingerprints
from wuerstchen_pl.models.wrapping import checkpoint_activations, compile_blocks

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage

logger = logging.getLogger(__name__)

REQUEUE = 75
"""Exit code of a run that was interrupted and can be resumed: EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells have it."""


def run(cfg: DictConfig) -> float:
    """Check, build, fit; returns the last validation loss, which a sweep minimizes."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        cfg.paths.output_dir = HydraConfig.get().runtime.output_dir
    check_config(cfg)
    check_ranges(cfg)
    output_dir = check_output_dir(cfg.paths.output_dir)
    resume = find_resume(cfg.ckpt, output_dir)
    if resume is not None and load.parse_step(resume) >= cfg.trainer.max_steps >= 0:
        logger.info("%s is finished, at step %d", output_dir, load.parse_step(resume))
        return float("nan")
    _quieten()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")

    data: L.LightningDataModule = hydra.utils.instantiate(cfg.data, _convert_="all")
    stage = build_stage(cfg)
    if cfg.activation_checkpointing:
        checkpoint_activations(stage)
    if cfg.compile:
        compile_blocks(stage)
    check_sizes(stage, data)
    check_cache(stage, data)
    rank_zero_only(print)(describe_sizes(stage, data))
    trainer = build_trainer(cfg)
    rank_zero_only(data.prepare_data)()  # so that data that are not there leave no folder behind
    output_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
    fit(trainer, stage, data, resume, output_dir)
    return float(trainer.callback_metrics.get("val/loss", torch.tensor(torch.nan)))


def fit(
    trainer: L.Trainer,
    stage: "Stage",
    data: L.LightningDataModule,
    resume: Path | None,
    output_dir: Path,
) -> None:
    """Train to the end.

    Raises:
        Exit: if it was interrupted before.
    """
    try:
        trainer.fit(stage, data, ckpt_path=resume, weights_only=True)
    except Preempted as stop:
        code = INTERRUPTED if stop.signum == signal.SIGINT else REQUEUE
        raise Exit(
            f"{output_dir} was stopped by {stop} after step {trainer.global_step}, which is saved; "
            "the same command with ckpt=auto resumes it",
            code,
        ) from None
    except SystemExit:  # Lightning's answer to Ctrl-C, where the first one was not waited for
        raise Exit(
            f"{output_dir} was interrupted at step {trainer.global_step}; ckpt=auto resumes from "
            "its last checkpoint",
            INTERRUPTED,
        ) from None
    finally:  # Lightning does not after an error, and workers would keep opening shards
        data.teardown("fit")


def build_trainer(cfg: DictConfig) -> L.Trainer:
    """The trainer of a config, with callbacks and loggers, which takes its batches by our keys."""
    trainer: L.Trainer = hydra.utils.instantiate(
        cfg.trainer,
        callbacks=_built(cfg.callbacks),
        logger=_built(cfg.logger),
        _convert_="all",
    )
    if cfg.global_batch is not None:
        trainer.accumulate_grad_batches = accumulation(
            cfg.global_batch, cfg.data.batch_size, trainer.world_size
        )
    # Lightning counts batches, where our key says steps.
    trainer.val_check_interval *= trainer.accumulate_grad_batches
    if not isinstance(trainer.strategy, FSDP2Strategy):
        trainer.strategy.checkpoint_io = SingleFileCheckpointIO()
    return trainer


def _built(group: DictConfig) -> list[Any]:
    """The objects of a group, but for those that are null."""
    configs = [config for config in group.values() if config is not None]
    return [hydra.utils.instantiate(config, _convert_="all") for config in configs]


def build_stage(cfg: DictConfig) -> "Stage":
    """The stage of a config, with the weights of ``init_from`` if that is given."""
    stage: Stage = hydra.utils.instantiate(cfg.stage, _convert_="all")
    config: Any = OmegaConf.to_container(cfg.stage, resolve=True)
    stage.record_provenance(config=config)
    if cfg.init_from is not None:
        path = load.find_checkpoint(cfg.init_from)
        state = load.read_checkpoint(path, optimizer_state=False)
        shadow = state["ema"]["shadow"]
        kind = "EMA" if shadow else "raw (there is no EMA yet)"
        logger.info("init_from: %s, weights: %s, step %s", path, kind, state.get("global_step"))
        stage.load_state_dict({**state["state_dict"], **shadow})
    return stage


def check_ranges(cfg: DictConfig) -> None:
    """Refuse numbers that would fail only once training has begun.

    Raises:
        ValueError: naming the key, its value and the fix.
    """
    precision = str(cfg.trainer.precision)
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f"trainer.precision={precision} overflows or mixes types in these networks; use "
            "bf16-mixed or 32-true"
        )
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"trainer.accelerator={cfg.trainer.accelerator} finds no GPU that torch can use here; "
            "use trainer.accelerator=cpu, or fix the driver"
        )
    strategy = OmegaConf.select(cfg, "trainer.strategy._target_")
    sharded = strategy == f"{FSDP2Strategy.__module__}.{FSDP2Strategy.__qualname__}"
    if sharded and cfg.stage.optimizer._target_.startswith("bitsandbytes"):
        raise ValueError(
            "optimizer@stage.optimizer=adamw_8bit does not support sharded weights; use "
            "trainer=ddp, or optimizer@stage.optimizer=adamw, whose state is sharded too"
        )
    for key in ("validate_every_steps", "checkpoint_every_steps"):
        if cfg[key] < 1:
            raise ValueError(f"{key}={cfg[key]} is out of range; use 1 or more")
    if cfg.stage.optimizer.lr <= 0:
        raise ValueError(
            f"stage.optimizer.lr={cfg.stage.optimizer.lr} learns nothing; use more than 0"
        )


def find_resume(ckpt: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from.

    Raises:
        FileNotFoundError: if ``ckpt`` names none.
        ValueError: if the run's folder contains a run and ckpt is not set.
    """
    has_run = any(output_dir.glob("checkpoints/step*.ckpt"))
    if ckpt == "auto":
        return load.find_checkpoint(output_dir) if has_run else None
    if ckpt is not None:
        return load.find_checkpoint(ckpt)
    if has_run:
        raise ValueError(
            f"paths.output_dir={output_dir} holds a run already; resume it (ckpt=auto), or "
            "choose another paths.output_dir or name"
        )
    return None


def accumulation(global_batch: int, batch_size: int, processes: int) -> int:
    """Batches of each process that make a step of ``global_batch`` samples.

    Raises:
        ValueError: if no whole number of them does.
    """
    at_once = batch_size * processes
    if global_batch < 1 or global_batch % at_once:
        raise ValueError(
            f"global_batch={global_batch} is not a multiple of {at_once}, which is data.batch_size="
            f"{batch_size} on {processes} process{'es' * (processes > 1)}; set data.batch_size to "
            f"a divisor of {global_batch / processes:g}"
        )
    return global_batch // at_once


def check_sizes(stage: "Stage", data: L.LightningDataModule) -> None:
    """Refuse image sizes that the stages cannot divide.

    Raises:
        ValueError: naming the first such size.
    """
    for height, width in data.sizes:  # type: ignore[attr-defined]
        if height % stage.size_multiple or width % stage.size_multiple:
            raise ValueError(
                f"a bucket of {height} x {width} px is not a multiple of {stage.size_multiple}, as "
                f"{type(stage).__name__} needs; set data.bucket_multiple={stage.size_multiple} or "
                "a multiple of it"
            )


def check_cache(stage: "Stage", data: L.LightningDataModule) -> None:
    """Refuse a cache that other frozen networks made than this stage has.

    Raises:
        ValueError: naming what differs.
    """
    made_with: dict[str, str] | None = getattr(data, "made_with", None)
    if made_with is None:
        return
    current = {"stage": stage.name}
    encoder = stage.frozen.get("stage_b" if stage.name == "c" else "stage_a")
    if encoder is not None:
        text = stage.frozen.get("text_encoder") if "text_encoder" in made_with else None
        current = encoder_fingerprints(stage.name, encoder=encoder, text_encoder=text)
    for name, value in made_with.items():
        if current.get(name) != value:
            raise ValueError(
                f"data.root is a cache made with {name} {value[:12]}, and this run has "
                f"{current.get(name, 'none')[:12]}; make it again with python -m "
                f"wuerstchen_pl.cache, or name the {name} that it was made with"
            )


def describe_sizes(stage: "Stage", data: L.LightningDataModule) -> str:
    """The sizes of batches, with the number of semantic positions of each."""
    parts = []
    for height, width in data.sizes:  # type: ignore[attr-defined]
        positions = stage.semantic_size(height, width)
        semantic = "" if positions is None else f" ({positions[0]} x {positions[1]})"
        parts.append(f"{height} x {width}{semantic}")
    unit = "px" if stage.semantic_size(1, 1) is None else "px (and semantic positions)"
    return f"buckets, height x width in {unit}: {', '.join(parts)}"


def _quieten() -> None:
    """Silence Lightning's advice, which these runs have taken or cannot take."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for advice in (
        "does not have many workers",
        "Checkpoint directory",
        "You are trying to `self",
        "treespec",
        "It is recommended to use `self",
        "Grad strides do not match bucket",
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")


main = command("train", run)

if __name__ == "__main__":
    main()
