"""From trained stages to images."""

from pathlib import Path

import pytest
import torch

from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.evaluation.dataset_metrics import codebook
from wuerstchen_pl.pipelines.generate import SamplingConfig
from wuerstchen_pl.pipelines.generate import generate_images as draw_all

FAST = SamplingConfig(prior_steps=3, decoder_steps=2, batch_size=4)


@pytest.fixture(scope="module")
def pipeline(cascade: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.from_pretrained(str(cascade / "c"))


def draw(
    pipeline: WuerstchenPipeline,
    prompts: list[str],
    seeds: list[int],
    settings: SamplingConfig = FAST,
) -> torch.Tensor:
    drawn = draw_all(pipeline, prompts, seeds=seeds, height=64, width=64, settings=settings)
    return torch.stack(list(drawn))


def test_an_image_does_not_depend_on_its_batch(pipeline: WuerstchenPipeline) -> None:
    together = draw(pipeline, ["red apple", "frog", "bear"], [5, 6, 7])
    alone = draw(pipeline, ["frog"], [6])
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-5)
    assert (together[1] - draw(pipeline, ["frog"], [8])[0]).abs().max() > 1e-2


def test_ddim_depends_on_the_seed_alone(pipeline: WuerstchenPipeline) -> None:
    ddim = SamplingConfig(prior_steps=3, decoder_steps=2, sampler="ddim")
    first, again = (draw(pipeline, ["frog"], [3], ddim) for _ in range(2))
    assert torch.equal(first, again)


def test_stage_b_seed_and_latents_decide_the_reconstruction(pipeline: WuerstchenPipeline) -> None:
    images = torch.rand(3, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    how = {"num_inference_steps": 2, "output_type": "pt", "return_dict": False, "progress": False}
    whole = pipeline.reconstruct(images, seed=[1, 2, 3], **how)
    part = pipeline.reconstruct(images[1:2], seed=2, **how)
    torch.testing.assert_close(whole[1:2], part, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(0, 64), (1_000_003, 64), (64, 12), (-64, 64)])
def test_sizes_that_cannot_be_drawn_are_refused(
    pipeline: WuerstchenPipeline, height: int, width: int
) -> None:
    with pytest.raises(ValueError, match="use 16 to 4096, best a multiple of 16"):
        pipeline("frog", height, width, seed=0)


def test_codebook_use_counts_what_stage_a_chooses(pipeline: WuerstchenPipeline) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    use = codebook(pipeline, [images[:1], images[1:]])
    vqgan = pipeline.decoder.vqgan
    with torch.no_grad():
        chosen = vqgan.quantizer.indices(vqgan.features(images)).flatten()
    counts = torch.bincount(chosen, minlength=16).double()
    share = counts / counts.sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    assert use["codebook/perplexity"].value == pytest.approx(float(entropy.exp()), rel=1e-4)
    assert use["codebook/dead"].value == int((counts == 0).sum())
