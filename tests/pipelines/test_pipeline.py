"""Image generation with a pipeline of trained stages."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.evaluation.dataset_metrics import codebook
from wuerstchen_pl.models.compressor import SemanticCompressor
from wuerstchen_pl.models.diffnext import DiffNeXt
from wuerstchen_pl.models.fingerprint import weights_fingerprint
from wuerstchen_pl.models.prior import Prior
from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.vqgan import VQGAN
from wuerstchen_pl.pipelines.generate import generate_images
from wuerstchen_pl.sampling.config import SamplingConfig

FAST = SamplingConfig(prior_steps=3, decoder_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def pipeline(cascade: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.from_pretrained(str(cascade / "c"))


def generate(
    pipeline: WuerstchenPipeline,
    prompts: list[str],
    seeds: list[int],
    settings: SamplingConfig = FAST,
) -> torch.Tensor:
    images = generate_images(pipeline, prompts, seeds=seeds, height=64, width=64, settings=settings)
    return torch.stack(list(images))


def test_each_network_of_a_run_is_built_once(
    cascade: Path, pipeline: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[type] = []
    for network in (Prior, TextEncoder, DiffNeXt, SemanticCompressor, VQGAN):
        initialize = network.__init__

        @functools.wraps(initialize)  # a config is completed by the constructor's defaults
        def spy(self: Any, *args: Any, initialize: Any = initialize, **kwargs: Any) -> None:
            built.append(type(self))
            initialize(self, *args, **kwargs)

        monkeypatch.setattr(network, "__init__", spy)
    loaded = WuerstchenPipeline.from_pretrained(cascade / "c")
    assert sorted(built, key=str) == sorted(map(type, pipeline.modules), key=str)
    assert not any(p.requires_grad for net in loaded.modules for p in net.parameters())
    assert not any(part.training for net in loaded.modules for part in net.modules())
    assert weights_fingerprint(loaded.modules) == weights_fingerprint(pipeline.modules)


def test_an_image_does_not_depend_on_its_batch(pipeline: WuerstchenPipeline) -> None:
    together = generate(pipeline, ["red apple", "frog", "bear"], [5, 6, 7])
    alone = generate(pipeline, ["frog"], [6])
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-5)
    assert (together[1] - generate(pipeline, ["frog"], [8])[0]).abs().max() > 1e-2


def test_ddim_depends_on_the_seed_only(pipeline: WuerstchenPipeline) -> None:
    ddim = SamplingConfig(
        prior_steps=3, decoder_steps=2, prior_sampler="ddim", decoder_sampler="ddim"
    )
    first, again = (generate(pipeline, ["frog"], [3], ddim) for _ in range(2))
    assert torch.equal(first, again)


def test_seed_and_image_determine_the_reconstruction(pipeline: WuerstchenPipeline) -> None:
    images = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "num_inference_steps": 2,
        "output_type": "pt",
        "return_dict": False,
        "progress": False,
    }
    batch = pipeline.reconstruct(images, seed=[1, 2, 3], **options)
    alone = pipeline.reconstruct(images[1:2], seed=2, **options)
    torch.testing.assert_close(batch[1:2], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(0, 64), (1_000_003, 64), (64, 12), (-64, 64)])
def test_unsupported_sizes_are_rejected(
    pipeline: WuerstchenPipeline, height: int, width: int
) -> None:
    with pytest.raises(ValueError, match="use 16 to 4096, preferably a multiple of 16"):
        pipeline("frog", height, width, seed=0)


def test_codebook_usage_counts_the_codes_that_stage_a_chooses(pipeline: WuerstchenPipeline) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    usage = codebook(pipeline, [images[:1], images[1:]])
    vqgan = pipeline.vqgan
    with torch.no_grad():
        indices = vqgan.quantizer.indices(vqgan.features(images)).flatten()
    counts = torch.bincount(indices, minlength=16).double()
    share = counts / counts.sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    assert usage["codebook/perplexity"].value == pytest.approx(float(entropy.exp()), rel=1e-4)
    assert usage["codebook/dead"].value == int((counts == 0).sum())
