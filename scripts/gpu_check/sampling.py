"""Time of text to image at 1024 px against diffusers with fused attention, from single steps."""

from collections.abc import Iterator
from typing import Any

import hydra
import torch
from diffusers.utils import logging

from scripts import bench_inference, reference_models
from scripts.gpu_check import synthetic
from scripts.gpu_check.rows import Row, at_least, at_most
from scripts.gpu_check.sizes import Check, Size
from scripts.timing import median_seconds, side_by_side
from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.distributed.launch import resolve_device
from wuerstchen_pl.formats.config_map import from_diffusers
from wuerstchen_pl.formats.key_map import from_external, key_mappings
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import DIFFNEXT, PRIOR, SCALE, VQGAN, with_defaults
from wuerstchen_pl.sampling.latent_decoder import LatentDecoderSampler
from wuerstchen_pl.sampling.prior import PriorSampler

STEPS = {"Stage C step (SDPA)": 60, "Stage B step": 12, "Stage A decoding": 1}
"""Case of ``bench_inference`` -> how often an image computes it, with the paper's settings."""
RATIO = 1.4
"""Goal for the time of diffusers relative to this package."""
DTYPE = torch.bfloat16
SMALL = bench_inference.Size(
    {"c": 32, "c_cond": 16, "depth": 2, "nhead": 2},
    {
        "c_hidden": [16, 32], "c_cond": 16, "blocks": [1, 1], "nhead": [-1, 2],
        "level_config": ["CT", "CTA"], "inject_effnet": [False, True], "clip_embd": 16,
    },
    {"embed_dim": 16, "bottleneck_blocks": 1, "num_vq_embeddings": 16}, 64, 30, (1,),
)  # fmt: skip


@torch.no_grad()
def rows(check: Check) -> Iterator[Row]:
    """Both packages with the same batch, then this one compiled, with the smallest one."""
    torch.set_float32_matmul_precision("high")
    logging.set_verbosity_error()
    reference, package = build_pair(check.size)
    for batch in check.size.sampling_batches:
        yield from compare(reference, package, batch, check.size)
    package.compile()
    yield compiled_row(reference, package, check.size)


def build_pair(size: Size) -> tuple[reference_models.Networks, WuerstchenPipeline]:
    """diffusers' networks and our pipeline, with the same random weights."""
    networks = bench_inference.SIZES["published"] if size.full else SMALL
    with resolve_device():
        reference = reference_models.networks(
            networks.prior, {**reference_models.PUBLISHED_DECODER, **networks.decoder},
            networks.vqgan,
        )  # fmt: skip
        prior, decoder, vqgan = (
            convert(target, net)
            for target, net in zip((PRIOR, DIFFNEXT, VQGAN), reference, strict=True)
        )
        package = WuerstchenPipeline(
            prior=PriorSampler(
                prior=prior, text_encoder=synthetic.build_text_encoder(prior.text_dim)
            ),
            decoder=LatentDecoderSampler(
                decoder=decoder, vqgan=vqgan,
                text_encoder=synthetic.build_text_encoder(decoder.text_dim),
            ),
        )  # fmt: skip
    for net in reference:
        net.to(DTYPE)
    return reference, package.to(resolve_device(), DTYPE)


def convert(target: str, reference: Any) -> Any:
    """The network ``target`` with the size and weights of diffusers' network."""
    config = with_defaults(from_diffusers(target, reference.config, target))
    net = hydra.utils.instantiate(config, _convert_="all").eval()
    state = net.state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items() if name != SCALE}
    tensors = {name: in_memory(t) for name, t in reference.state_dict().items()}
    mapped = from_external(tensors, key_mappings(config, shapes, "diffusers"), shapes, target)
    net.load_state_dict(state | {name: lazy.load() for name, lazy in mapped.items()})
    return net


def compare(
    reference: reference_models.Networks, package: WuerstchenPipeline, batch: int, size: Size
) -> Iterator[Row]:
    """Time and difference of each step, and the ratio of the times of an image."""
    name = f"{size.image_size} px, batch {batch}"
    totals = [0.0, 0.0]
    for case in cases(reference, package, batch, size):
        a, b = case.reference().float(), case.package().float()
        difference = float((a - b).abs().max() / a.std())
        what = f"{name}, {case.name}: difference in standard deviations"
        yield at_most(what, difference, bench_inference.TOLERANCE[DTYPE], "{:.3f}")
        timing = side_by_side(case.reference, case.package, size.timed_steps)
        measured = f"diffusers {timing.reference_ms:.1f} ms, ours {timing.package_ms:.1f} ms"
        yield Row(f"{name}, {case.name}", measured)
        for i, milliseconds in enumerate((timing.reference_ms, timing.package_ms)):
            totals[i] += STEPS[case.name] * milliseconds / 1e3
    steps = "60 + 12 steps and Stage A"
    yield Row(f"{name}, {steps}", f"diffusers {totals[0]:.2f} s, ours {totals[1]:.2f} s")
    ratio = totals[0] / totals[1]
    yield at_least(f"{name}, {steps}: ratio", ratio, RATIO, "{:.2f}", judged=size.full)


def cases(
    reference: reference_models.Networks, package: WuerstchenPipeline, batch: int, size: Size
) -> Iterator[bench_inference.Case]:
    """The cases of ``bench_inference`` that an image needs."""
    device = resolve_device()
    steps = bench_inference.step_cases(reference, package, size.image_size, batch, device, DTYPE)
    return (case for case in steps if case.name in STEPS)


def compiled_row(
    reference: reference_models.Networks, package: WuerstchenPipeline, size: Size
) -> Row:
    """Times of our pipeline alone, compiled, with the smallest batch."""
    batch = size.sampling_batches[0]
    seconds = {
        case.name: median_seconds(case.package, size.timed_steps)
        for case in cases(reference, package, batch, size)
    }
    total = sum(STEPS[name] * duration for name, duration in seconds.items())
    times = ", ".join(f"{name} {duration * 1e3:.1f} ms" for name, duration in seconds.items())
    return Row(f"{size.image_size} px, batch {batch}, ours compiled", f"{times}; {total:.2f} s")
