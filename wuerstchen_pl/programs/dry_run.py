"""``train dry_run=true``: which settings of a training fit on which GPU, without its weights.

The stage is built on the meta device, and runs one training step on a pretended GPU. What the step
needs is estimated as at the start of a run; see ``callbacks.memory_estimate``.
"""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import hydra
import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from omegaconf import DictConfig, OmegaConf, open_dict

from wuerstchen_pl.batch import Batch
from wuerstchen_pl.callbacks.memory_estimate import ema_on_host, estimate_bytes
from wuerstchen_pl.callbacks.step_profile import forget_profile, profile_step_once
from wuerstchen_pl.cli.config import conf_dir
from wuerstchen_pl.models.activations import checkpoint_activations
from wuerstchen_pl.models.fake_cuda import DEVICE, FakeCUDA, FlashAttention, fake_cuda
from wuerstchen_pl.models.meta import on_meta
from wuerstchen_pl.programs.base_model import networks_of_base_model, stage_name, use_base_model
from wuerstchen_pl.programs.memory_table import Setting, advice, memory_table
from wuerstchen_pl.programs.training_cache import cached_text_encoder
from wuerstchen_pl.stages.data_checks import check_sizes

if TYPE_CHECKING:
    from wuerstchen_pl.data.datamodule import ImageTextDataModule
    from wuerstchen_pl.stages.stage import Stage

MIXED: Literal["bf16-mixed"] = "bf16-mixed"
ROWS = 4
"""Samples of the step, as many as the estimate of a run profiles."""


class Variant(NamedTuple):
    """A config, from which settings that need less memory start."""

    label: str
    overrides: str
    """What makes the run this variant."""
    cfg: DictConfig
    advised: bool


def describe_memory(cfg: DictConfig) -> str:
    """The table of settings, and with which overrides the run fits on smaller GPUs.

    Args:
        cfg: the config of ``train``.

    Raises:
        FileNotFoundError: if a model does not exist.
        ValueError: if a network is missing, or a size cannot be encoded.
    """
    settings = [setting for variant in variants(cfg) for setting in settings_of(variant)]
    rows, precision = cfg.data.batch_size, f"trainer.precision={cfg.trainer.precision}"
    rows_per_step = cfg.global_batch or rows * cfg.trainer.accumulate_grad_batches
    title = f"GB for batches of n images with {precision}, and the largest n on one GPU:"
    sentence = advice(settings, rows=rows, rows_per_step=rows_per_step)
    return f"{title}\n{memory_table(settings)}\n{sentence}"


def variants(cfg: DictConfig) -> list[Variant]:
    """The run; and of a base model its other kind, full tuning or an adapter, adapters last."""
    this_run = Variant("this run", "", cfg, advised=True)
    stage = stage_name(cfg)
    is_other = any(cfg.stage.get(key) is not None for key in ("words", "controlnet", "teacher"))
    if not networks_of_base_model(cfg) or stage not in ("b", "c") or is_other:
        return [this_run]
    other = copy.deepcopy(cfg)
    with open_dict(other):
        if cfg.stage.get("adapter") is not None:
            for key in {"adapter", "text_adapter", "preservation"} & cfg.stage.keys():
                other.stage[key] = None
            return [Variant("experiment=finetune", "experiment=finetune", other, False), this_run]
        experiment = OmegaConf.load(Path(conf_dir(), "experiment/lora", f"{stage}.yaml"))
        other.stage.adapter = experiment.stage.adapter
    return [this_run, Variant("experiment=lora", "experiment=lora", other, True)]


def settings_of(variant: Variant) -> Iterator[Setting]:
    """A variant, and settings that need less memory, each on top of the one before."""
    label, overrides, cfg, advised = variant
    stage, data = _without_weights(cfg)
    with fake_cuda(FakeCUDA()), FlashAttention():
        stage.setup("fit")  # frozen networks stay where they are until the step uses them
        stage.to_empty(device=DEVICE)
        stage.trainer = _trainer(cfg.trainer.precision)
        batch, optimizer = _batch(cfg, stage, data), stage.configure_optimizers()["optimizer"]

        def setting(label: str, override: str = "") -> Setting:
            nonlocal overrides
            overrides = f"{overrides} {override}".strip()
            return _measured(stage, optimizer, batch, label, overrides, advised)

        if cfg.activation_checkpointing is True:
            checkpoint_activations(stage)
        plain = setting(label)
        yield plain
        if cfg.activation_checkpointing is not True:
            checkpoint_activations(stage)
            forget_profile(stage)
            override = "activation_checkpointing=true"  # which auto chooses itself
            is_auto = cfg.activation_checkpointing == "auto"
            yield setting(f"+ {override}", "" if is_auto else override)
        if any(adapter.base_dtype == torch.float32 for adapter in stage.adapters.values()):
            override = _cast_bases(stage)
            if cfg.trainer.precision != MIXED:
                stage.trainer = _trainer(MIXED)
                override += f" trainer.precision={MIXED}"
            forget_profile(stage)
            yield setting(f"+ {override}", override)
        if plain.state["gradients"] < 0.1 * plain.state["weights"]:
            return  # the rest would save little
        if override := ema_on_host(stage):
            stage.ema.device = "cpu"
            yield setting("+ stage.ema.device=cpu", override)
        is_8_bit = type(optimizer).__module__.startswith("bitsandbytes")
        if not is_8_bit and (eight_bit := _eight_bit(stage)) is not None:
            optimizer = eight_bit
            override = "optimizer@stage.optimizer=adamw_8bit"
            yield setting(f"+ {override}", override)


def _without_weights(cfg: DictConfig) -> "tuple[Stage, ImageTextDataModule]":
    cfg = copy.deepcopy(cfg)
    if cfg.trainer.max_steps == "auto":
        cfg.trainer.max_steps = 1  # only the learning rate depends on it
    with on_meta():
        use_base_model(cfg)
        stage: Stage = hydra.utils.instantiate(cfg.stage, _convert_="all")
    data: ImageTextDataModule = hydra.utils.instantiate(cfg.data, _convert_="all")
    check_sizes(stage, data)
    return stage, data


def _cast_bases(stage: "Stage") -> str:
    """Cast the bases of adapters to bfloat16; returns the overrides that do so."""
    for name, adapter in stage.adapters.items():
        adapter.base_dtype = torch.bfloat16
        adapter.cast_base(getattr(stage, name))
    keys = ("text_adapter" if name == "text_encoder" else "adapter" for name in stage.adapters)
    return " ".join(f"stage.{key}.base_dtype=bfloat16" for key in keys)


def _trainer(precision: str) -> L.Trainer:
    """A trainer of one process."""
    return L.Trainer(
        accelerator="cpu", devices=1, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        plugins=[MixedPrecision(MIXED, "cuda")] if precision == MIXED else [],
    )  # fmt: skip


def _batch(cfg: DictConfig, stage: "Stage", data: "ImageTextDataModule") -> Batch:
    """A batch of the largest size, with what the run reads from a cache."""

    def tensor(*shape: int, rows: int = ROWS) -> torch.Tensor:
        return torch.empty(rows, *shape, device=DEVICE)

    height, width = max(data.sizes, key=lambda size: size[0] * size[1])
    batch: dict[str, Any] = {"caption": [""] * ROWS, "key": [""] * ROWS}
    is_cached = cfg.cache or hasattr(data, "made_with")
    if is_cached and stage.name == "c":
        channels = stage.stage_b.latent_channels
        batch["semantic"] = tensor(channels, *(stage.semantic_size(height, width) or ()))
    else:
        batch["image"] = tensor(3, height, width)
    if is_cached and stage.name == "b":
        vqgan = stage.stage_a.vqgan
        size = (height // vqgan.factor, width // vqgan.factor)
        batch["latents"] = tensor(vqgan.latent_channels, *size)
    text = cached_text_encoder(stage, data) if is_cached else None
    if text is not None:
        batch["text"] = tensor(text.context_length, text.width)
        batch["empty_text"] = tensor(text.context_length, text.width, rows=1)
    if getattr(data, "mask", None) is not None:
        batch["mask"] = tensor(1, height, width)
    if getattr(data, "control", False):
        batch["control"] = tensor(3, height, width)
    return batch  # type: ignore[return-value]


def _measured(
    stage: "Stage", optimizer: torch.optim.Optimizer, batch: Batch,
    label: str, overrides: str, advised: bool,
) -> Setting:  # fmt: skip
    state = estimate_bytes(stage, optimizer, batch)
    per_sample = profile_step_once(stage, batch).saved_bytes_per_sample
    activations = state.pop("activations") - ROWS * per_sample
    return Setting(
        label=label, overrides=overrides, state=state, activations=activations,
        per_sample=per_sample, advised=advised,
    )  # fmt: skip


def _eight_bit(stage: "Stage") -> torch.optim.Optimizer | None:
    """AdamW with its state in 8 bits; None if it is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        return None
    return AdamW8bit([p for p in stage.parameters() if p.requires_grad])
