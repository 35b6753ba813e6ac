"""Time inference against diffusers on the same random weights, and compare the outputs."""

import tempfile
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import logging

from scripts import reference_models
from scripts.timing import Work, side_by_side, write_table
from wuerstchen_pl import WuerstchenPipeline

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest allowed absolute difference; in bfloat16, in standard deviations of the output."""
WHOLE = "whole run"
HEADER = "| what | batch | mode | diffusers ms | ours ms | ratio | max difference |"


class Size(NamedTuple):
    """Network sizes, with diffusers' argument names, and what to generate with them."""

    prior: dict[str, Any]
    decoder: dict[str, Any]
    vqgan: dict[str, Any]
    side: int  # of the image, in pixels
    prior_steps: int
    batches: tuple[int, ...]


SIZES = {
    "small": Size(
        {"c": 256, "c_cond": 256, "depth": 8, "nhead": 8},
        {
            "c_hidden": [64, 128, 256, 256], "c_cond": 256, "blocks": [2, 4, 6, 2],
            "nhead": [-1, 2, 4, 4], "clip_embd": 256,
        },
        {"embed_dim": 96}, 512, 30, (1,),
    ),
    "published": Size(
        {"c": 1536, "c_cond": 1280, "depth": 32, "nhead": 24}, {}, {}, 1024, 30, (1, 16)
    ),
}  # fmt: skip


class Mode(NamedTuple):
    """How both implementations compute."""

    dtype: torch.dtype
    compiled: bool

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{str(self.dtype).removeprefix('torch.')}{', compiled' * self.compiled}"

    @property
    def time(self) -> float:
        """Of the compared steps: 0, unless diffusers computes the embeddings of others exactly.

        It computes them in bfloat16, and if compiled by sines that are not exact at 10,000 t.
        """
        return 0.5 if self.dtype == torch.float32 and not self.compiled else 0.0


MODES = {
    "cpu": [Mode(dtype, c) for dtype in (torch.float32, torch.bfloat16) for c in (False, True)],
    "cuda": [Mode(torch.bfloat16, compiled) for compiled in (False, True)],
}


class Case(NamedTuple):
    """A computation to time in both implementations; each returns the output to compare."""

    name: str
    reference: Work
    package: Work


def run(size: str, rounds: int) -> Path:
    """Run the benchmark and write its table; returns the path.

    Raises:
        RuntimeError: if the outputs differ, because the timings would not be comparable.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    networks = SIZES[size]
    rows = []
    print(HEADER)
    for mode in MODES[device]:
        reference, package = build_pair(networks, device, mode)
        for batch in networks.batches:
            steps = step_cases(
                reference, package, networks.side, batch, device, mode.dtype, time=mode.time
            )
            # chained, because attention is replaced while the generator waits
            for case in chain(steps, [whole_run(reference, package, networks, batch)]):
                rows.append(_row(case, batch, mode, rounds))
                print(rows[-1], flush=True)
    return write_table(
        f"inference_{size}",
        f"python scripts/bench.py inference --size {size} --rounds {rounds}"
        + ("" if device == "cuda" else f" --threads {torch.get_num_threads()}"),
        f"Against diffusers {reference_models.VERSION} in the same mode: milliseconds, medians of "
        f"{rounds} alternating rounds; ratio is the median of the per-round ratios, above 1 where "
        "this package is faster. \"SDPA\" is diffusers with AttnProcessor2_0 in its prior. A run "
        f"is {networks.prior_steps} steps of Stage C with guidance 4, 12 of Stage B, and Stage A, "
        f"{networks.side} px.",
        HEADER,
        rows,
    )  # fmt: skip


def build_pair(size: Size, device: str, mode: Mode) -> tuple[Any, WuerstchenPipeline]:
    """diffusers' pipeline and ours, with the same random weights."""
    with tempfile.TemporaryDirectory() as folder:
        decoder = {**reference_models.PUBLISHED_DECODER, **size.decoder}
        reference = reference_models.combined(Path(folder), size.prior, decoder, size.vqgan)
        paths = reference_models.save_pair(reference, Path(folder))
        package = WuerstchenPipeline.from_pretrained(str(paths[0]), prior=str(paths[1]))
    reference.to(device, mode.dtype)
    package.to(device, mode.dtype)
    if mode.compiled:
        _compile(reference, package)
    return reference, package


def _row(case: Case, batch: int, mode: Mode, rounds: int) -> str:
    reference, package = case.reference().float(), case.package().float()
    difference = float((reference - package).abs().max())
    if mode.dtype != torch.float32:
        difference /= float(reference.std())
    # in bfloat16, diffusers samples the initial noise in bfloat16 too, which gives another image
    comparable = mode.time > 0 or case.name != WHOLE
    if comparable and not difference < TOLERANCE[mode.dtype]:
        raise RuntimeError(f"{case.name}: outputs differ by {difference}; nothing was timed")
    timing = side_by_side(case.reference, case.package, rounds)
    return (
        f"| {case.name} | {batch} | {mode.name} | {timing.reference_ms:.1f} "
        f"| {timing.package_ms:.1f} | {timing.ratio:.2f} | {difference:.1e} |"
    )


def _compile(reference: Any, package: WuerstchenPipeline) -> None:
    for net in (reference.prior_prior, reference.decoder):
        net.forward = torch.compile(net.forward)
    reference.vqgan.decode = torch.compile(reference.vqgan.decode)
    package.compile()


@torch.no_grad()
def step_cases(
    reference: Any,
    package: WuerstchenPipeline,
    side: int,
    batch: int,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    time: float = 0.0,
) -> Iterator[Case]:
    """A step of Stage C and of Stage B, and Stage A's decoder; time each before the next.

    Args:
        reference: diffusers' networks, a ``WuerstchenCombinedPipeline`` or ``Networks``.
        package: our pipeline, with networks of the same sizes.
        side: of the image, in pixels.
        batch: number of images.
        device: of the networks.
        dtype: of the networks.
        time: of the steps; see ``Mode.time``.
    """
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(device, dtype)

    def without_grad(work: Work) -> Work:
        return torch.no_grad()(work)

    grid, latents = -(-side * 3 // 128), side // 4
    times = torch.tensor([time], device=device)
    t = times.to(dtype).expand(2 * batch)
    # Stage C has two rows per image, for guidance
    x, text = (
        randn(2 * batch, 16, grid, grid),
        randn(2 * batch, 77, reference.prior_prior.config.c_cond),
    )
    prior = [c.at_step(0) for c in package.prior.prior.cache_conditioning(times, text)]
    plain = Case(
        "Stage C step", without_grad(lambda: reference.prior_prior(x, t, text)),
        without_grad(lambda: package.prior.predict_noise(x, prior)),
    )  # fmt: skip
    yield plain
    processors = reference.prior_prior.attn_processors
    reference.prior_prior.set_attn_processor(AttnProcessor2_0())
    yield plain._replace(name="Stage C step (SDPA)")
    reference.prior_prior.set_attn_processor(processors)

    z, semantic = randn(batch, 4, latents, latents), randn(batch, 16, grid, grid)
    clip = randn(batch, 77, reference.decoder.config.clip_embd)
    decoder = [
        c.at_step(0)
        for c in package.decoder.decoder.cache_conditioning(
            times, semantic, clip, (latents, latents)
        )
    ]
    yield Case(
        "Stage B step", without_grad(lambda: reference.decoder(z, t[:batch], semantic, clip)),
        without_grad(lambda: package.decoder.predict(z, decoder)),
    )  # fmt: skip
    scale = reference.vqgan.config.scale_factor
    yield Case(
        "Stage A decoding", without_grad(lambda: reference.vqgan.decode(z * scale).sample),
        without_grad(lambda: package.decoder.decode(z)),
    )  # fmt: skip


def whole_run(reference: Any, package: WuerstchenPipeline, size: Size, batch: int) -> Case:
    """Text to images."""

    def run(pipe: Any, **options: Any) -> torch.Tensor:
        return pipe(
            "a red heart", size.side, size.side, size.prior_steps, num_images_per_prompt=batch,
            generator=torch.Generator().manual_seed(0), output_type="pt", **options,
        ).images  # fmt: skip

    return Case(WHOLE, lambda: run(reference), lambda: run(package, progress=False))
