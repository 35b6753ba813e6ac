"""The memory estimate of a run that trains an adapter: what is trained counts, not its base."""

from typing import Any

import lightning as L
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.distributed.test_fsdp2 import smooth_batch
from tests.stages.conftest import stage_c
from wuerstchen_pl.adapters.adapter import Adapter, BaseDtype
from wuerstchen_pl.callbacks.memory_estimate import estimate_bytes
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder

WIDTH, DEPTH, RANK = 16, 3, 4
FACTORS = 4 * DEPTH * RANK * (WIDTH + WIDTH)
"""Bytes of A and B of one layer in each block."""


def estimate(mesh: DeviceMesh | None = None, base_dtype: BaseDtype = "float32") -> dict[str, int]:
    """The estimate for an adapter of one layer of each block, in steps of two batches."""
    torch.manual_seed(0)
    prior = Prior(width=WIDTH, depth=DEPTH, num_heads=2, text_dim=16, dropout=0.0)
    text: Any = TextEncoder(width=16, depth=1, num_heads=2, context_length=8)
    prior.source = text.source = {"path": "base", "sha256": "0"}
    adapter = Adapter(rank=RANK, targets=["*.attention.out"], base_dtype=base_dtype)
    stage = stage_c(prior=prior, text_encoder=text, train_text_encoder=False, adapter=adapter)
    stage.trainer = L.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=2)
    stage._device_mesh = mesh
    stage.setup("fit")
    stage.configure_model()
    optimizer = stage.configure_optimizers()["optimizer"]
    return estimate_bytes(stage, optimizer, smooth_batch())


def test_only_the_adapter_has_gradients_optimizer_state_and_ema() -> None:
    needed = estimate()
    base = Prior(width=WIDTH, depth=DEPTH, num_heads=2, text_dim=16)
    assert needed["weights"] == 4 * sum(p.numel() for p in base.parameters()) + FACTORS
    assert needed["gradients"] == needed["ema"] == FACTORS
    assert needed["optimizer"] == 2 * FACTORS


def test_a_base_in_bfloat16_takes_half_the_memory() -> None:
    plain, half = estimate(), estimate(base_dtype="bfloat16")
    assert half["weights"] - FACTORS == (plain["weights"] - FACTORS) / 2
    for name in ("gradients", "optimizer", "ema"):
        assert half[name] == plain[name]


def test_only_the_gradients_of_the_adapter_are_whole_between_batches(fake_processes: int) -> None:
    """And sharded: gradients, optimizer state and EMA."""
    needed = estimate(init_device_mesh("cpu", (fake_processes,)))
    shard = FACTORS // fake_processes
    assert needed["gradients"] == shard + FACTORS
    assert (needed["optimizer"], needed["ema"]) == (2 * shard, shard)


def test_weights_gathered_for_a_block_are_not_activations(mesh_of_one: DeviceMesh) -> None:
    assert estimate(mesh_of_one)["activations"] == estimate()["activations"]
