"""Compare a training step of Stage C's prior with diffusers': time and activation memory.

Same weights and batch, without dropout so that the losses can be compared: 8 blocks of width 512,
24 x 24 positions, batch 2; on a GPU, the published size in bfloat16 autocast. Memory is the bytes
that a forward pass saves for its backward pass, not counting weights.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import logging
from torch import Tensor, nn

from scripts import reference_models
from scripts.timing import Work, side_by_side, write_table
from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.models.activations import SavedActivations, checkpoint_activations

SMALL = {"c": 512, "c_cond": 512, "depth": 8, "nhead": 8}
PUBLISHED = {"c": 1536, "c_cond": 1280, "depth": 32, "nhead": 24}
DECODER = {
    "c_hidden": [64, 128, 256, 256], "c_cond": 256, "blocks": [2, 4, 6, 2],
    "nhead": [-1, 2, 4, 4], "clip_embd": 256,
}  # fmt: skip
Forward = Callable[[], Tensor]


def priors(config: dict[str, int]) -> tuple[Any, nn.Module]:
    """diffusers' prior and this package's, with the same random weights."""
    with tempfile.TemporaryDirectory() as folder:
        decoder = {**reference_models.PUBLISHED_DECODER, **DECODER}
        reference = reference_models.combined(Path(folder), config, decoder, {"embed_dim": 96})
        paths = reference_models.save_pair(reference, Path(folder))
        package = WuerstchenPipeline.from_pretrained(str(paths[0]), prior=str(paths[1]))
    for net in (reference.prior_prior, package.prior.prior):
        net.train().requires_grad_(True)
        for part in net.modules():
            if hasattr(part, "dropout") and isinstance(part.dropout, float):
                part.dropout = 0.0
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    return reference.prior_prior, package.prior.prior


def saved_bytes(net: nn.Module, forward: Forward) -> int:
    """Bytes that a forward pass saves for the backward pass, not counting weights."""
    saved = SavedActivations()
    with saved.collect():
        loss = forward()
    total = saved.nbytes(net.parameters())
    del loss
    return total


def train_step(net: nn.Module, forward: Forward, *, fused: bool) -> Work:
    """A training step: forward, backward, gradient clipping, AdamW."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-9, fused=fused)

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return step


def run(rounds: int) -> Path:
    """Run the benchmark and write its table; returns the path.

    Raises:
        RuntimeError: if the losses differ, because the timings would not be comparable.
    """
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    config, batch = (PUBLISHED, 16) if cuda else (SMALL, 2)
    reference, package = priors(config)
    reference.to(device)
    package.to(device)
    rng = torch.Generator().manual_seed(0)
    x, text = (
        torch.randn(batch, 16, 24, 24, generator=rng),
        torch.randn(batch, 77, config["c_cond"], generator=rng),
    )
    x, text, t = x.to(device), text.to(device), torch.full((batch,), 0.5, device=device)

    def loss_of(net: nn.Module) -> Forward:
        def forward() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                return net(x, t, text).float().square().mean()

        return forward

    rows, default = [], dict(reference.attn_processors)
    for mode in ("plain", "activation checkpointing"):
        if mode != "plain":
            checkpoint_activations(package)
        # a copy, because diffusers empties the dict
        for attention, processor in {"default": {**default}, "SDPA": AttnProcessor2_0()}.items():
            reference.set_attn_processor(processor)
            rows.append(row(reference, package, loss_of, f"{mode} | {attention}", rounds))
            print(rows[-1], flush=True)
    return write_table(
        "training_prior",
        "python scripts/bench.py prior" + ("" if cuda else f" --threads {torch.get_num_threads()}"),
        f"A training step of the prior, batch {batch}, 24 x 24 positions, {config}, against "
        f"diffusers {reference_models.VERSION} with its default attention and AttnProcessor2_0; "
        "ours with and without activation checkpointing, theirs without. Medians of "
        f"{rounds} alternating rounds. MB: saved by a forward pass for its backward pass.",
        "| ours | diffusers' attention | diffusers ms | ours ms | ratio | diffusers MB | ours MB "
        "| share |",
        rows,
    )


def row(
    reference: nn.Module, package: nn.Module, loss_of: Callable[[nn.Module], Forward], name: str,
    rounds: int,
) -> str:  # fmt: skip
    """Measure one row of the table."""
    a, b = loss_of(reference), loss_of(package)
    if abs(float(a()) / float(b()) - 1) > (2e-2 if torch.cuda.is_available() else 1e-4):
        raise RuntimeError(f"losses are {float(a())} and {float(b())}; nothing was timed")
    reference_bytes, package_bytes = saved_bytes(reference, a), saved_bytes(package, b)
    timing = side_by_side(
        train_step(reference, a, fused=False), train_step(package, b, fused=True), rounds
    )
    return (
        f"| {name} | {timing.reference_ms:.0f} | {timing.package_ms:.0f} | {timing.ratio:.2f} "
        f"| {reference_bytes / 1e6:.0f} | {package_bytes / 1e6:.0f} "
        f"| {package_bytes / reference_bytes:.2f} |"
    )
