"""Version 1: the pipeline draws, with a Stage B that samples tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import run_program
from tests.formats.conftest import CONFIGS, MODELS
from wuerstchen_pl.checkpointing.allowed import instantiate_allowed
from wuerstchen_pl.diffusion.sampler import generators_from_seeds, rand, randn
from wuerstchen_pl.diffusion.tokens import draw_tokens, random_tokens, sample_tokens
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import PAELLA, V1_SCALING, Model, Part, with_defaults
from wuerstchen_pl.pipelines.generate import generate_images
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline
from wuerstchen_pl.sampling.config import SamplingConfig
from wuerstchen_pl.sampling.images import to_tensor

PAELLA_CONFIG: dict[str, Any] = {
    "_target_": PAELLA, "codebook_size": 8, "token_dim": 8, "widths": [80, 80],
    "num_blocks": [1, 1], "num_heads": [None, 1], "cond_dim": 8, "text_dim": 12, "time_dim": 8,
}  # fmt: skip
FACTOR, POSITION = 4, 16
"""Pixels per token and per semantic position, along a side."""
SETTINGS = {
    **V1_SCALING, "resolution_multiple": float(POSITION), "image_size": 64.0,
    "latent_dim_scale": POSITION / FACTOR,
}  # fmt: skip
FEW = {"prior_num_inference_steps": 2, "num_inference_steps": 3, "progress": False}


def v1_model() -> Model:
    configs = {**CONFIGS, "decoder": PAELLA_CONFIG}
    configs["vqgan"] = {**CONFIGS["vqgan"], "codebook_size": 8}
    configs["compressor"] = {
        "_target_": MODELS + "compressor.SemanticCompressor", "resize": 1.0,
        "backbone": {"_target_": MODELS + "compressor.ConvBackbone", "width": 4, "depth": 4},
    }  # fmt: skip
    return Model({name: part(config) for name, config in configs.items()}, dict(SETTINGS))


def part(config: dict[str, Any]) -> Part:
    """A network with initialized weights, of which none is 0."""
    torch.manual_seed(0)
    state = instantiate_allowed(config).state_dict()
    for tensor in state.values():
        if tensor.is_floating_point() and tensor.ndim:
            tensor.add_(torch.randn_like(tensor), alpha=0.02)
    return Part(with_defaults(config), {name: in_memory(t) for name, t in state.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v1") / "model"
    registry.write_model(v1_model(), path, "native")
    return path


@pytest.fixture(scope="module")
def pipe(folder: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.from_pretrained(folder)


def test_the_pipeline_composes_prior_tokens_and_stage_a(pipe: WuerstchenPipeline) -> None:
    seeds, prompts, guidance = [3, 4], ["a red heart", "a green frog"], 2.0
    images = pipe(
        prompts, 48, 64, **FEW, seed=seeds, output_type="pt", decoder_guidance_scale=guidance,
        decoder_temperature=(0.9, 0.5),
    ).images  # fmt: skip

    generators = generators_from_seeds(seeds)
    semantic = pipe.prior(
        prompts,
        48,
        64,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=generators,
        progress=False,
    ).image_embeddings
    net: Any = pipe.decoder.decoder
    encoder: Any = pipe.decoder.text_encoder
    text = torch.cat([encoder(prompts), encoder([""]).expand(2, -1, -1)])
    cond = net.cache_conditioning(torch.cat([semantic, torch.zeros_like(semantic)]), text)
    shape, cpu = (2, 48 // FACTOR, 64 // FACTOR), torch.device("cpu")
    temperatures = torch.linspace(0.9, 0.5, 3).tolist()
    times = torch.linspace(1, 0, 4).tolist()

    def classify(tokens: Tensor, i: int) -> Tensor:
        logits = net.predict_logits(torch.cat([tokens] * 2), torch.full((4,), times[i]), cond)
        with_cond, without = logits.chunk(2)
        return without + guidance * (with_cond - without)

    with torch.no_grad():
        tokens = sample_tokens(
            classify,
            random_tokens(rand(shape, generators, cpu), 8),
            times,
            lambda logits, i: draw_tokens(logits, temperatures[i], rand(shape, generators, cpu)),
            lambda: rand(shape, generators, cpu),
        )
        codes = pipe.vqgan.quantizer.lookup(tokens)
        expected = pipe.vqgan.decode_features(codes).clamp(0, 1)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


def test_an_image_does_not_depend_on_its_batch(pipe: WuerstchenPipeline) -> None:
    def drawn(seeds: list[int]) -> np.ndarray:
        prompts = ["a red heart"] * len(seeds)
        return pipe(prompts, 64, 64, **FEW, seed=seeds, output_type="np").images

    together = drawn([1, 2, 3])
    np.testing.assert_allclose(drawn([2])[0], together[1], atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_images_are_inputs_too(pipe: WuerstchenPipeline) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    options: Any = {**FEW, "seed": 0, "output_type": "pt"}
    again = pipe.reconstruct(image, num_inference_steps=3, seed=0, output_type="pt").images
    semantic = pipe.encode(image)
    direct = pipe.decoder(
        semantic, "", num_inference_steps=3, seed=0, output_type="pt", size=(64, 64)
    )
    assert torch.equal(again, direct.images)
    kept = pipe.image_to_image("a fox", image, strength=0.0, **options).images
    generators = generators_from_seeds([0])
    randn(semantic.shape, generators, semantic.device)  # the noise of Stage C
    direct = pipe.decoder(
        semantic, "a fox", num_inference_steps=3, generator=generators, output_type="pt",
        size=(64, 64),
    )  # fmt: skip
    torch.testing.assert_close(kept, direct.images, atol=1e-5, rtol=0)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    filled = pipe.inpaint("a fox", image, mask, **options).images
    assert torch.equal(to_tensor(filled)[..., :32], image[..., :32])
    assert not torch.equal(to_tensor(filled)[..., 32:], image[..., 32:])


def test_what_the_other_version_reads_is_refused(
    pipe: WuerstchenPipeline, cascade: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="starts from tokens of shape \\(1, 16, 16\\)"):
        pipe.decoder(torch.zeros(1, 16, 4, 4), "", latents=torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match=r"temperature=\(0, 1\) is invalid; use two positive"):
        pipe("a fox", 64, 64, **FEW, decoder_temperature=(0, 1))
    v2 = WuerstchenPipeline.from_pretrained(cascade / "c")
    monkeypatch.setattr(v2.prior, "sample", None)  # refused before Stage C runs
    with pytest.raises(ValueError, match=r"decoder_temperature=\(1, 0.5\) is for version 1's"):
        v2("a fox", 64, 64, **FEW, decoder_temperature=(1, 0.5))
    settings = SamplingConfig(decoder_temperature=[1.0, 0.6])
    with pytest.raises(ValueError, match=r"decoder_temperature=\(1.0, 0.6\) is for version 1's"):
        list(generate_images(v2, ["a fox"], seeds=[0], height=64, width=64, settings=settings))


def test_saved_pipelines_and_upstream_files_draw_the_same(
    pipe: WuerstchenPipeline, folder: Path, tmp_path: Path
) -> None:
    arguments = [f"from={folder}", f"to={tmp_path / 'pt'}", "format=upstream"]
    with pytest.warns(UserWarning, match="format=upstream cannot store"):
        assert run_program("convert", arguments) == 0
    names = {path.name for path in (tmp_path / "pt").iterdir()}
    assert names == {"vqgan_f4_v1_500k.pt", "model_stage_b.pt", "model_stage_c.pt"}
    back = registry.read_model(str(tmp_path / "pt"))
    for part in ("prior_text_encoder", "text_encoder"):
        back.parts[part] = registry.read_model(str(folder)).parts[part]
    registry.write_model(back, tmp_path / "back", "native")
    pipe.save_pretrained(tmp_path / "saved")
    expected = pipe("a fox", 64, 64, **FEW, seed=5, output_type="np").images
    for path in (tmp_path / "back", tmp_path / "saved"):
        again = WuerstchenPipeline.from_pretrained(path)
        assert (again("a fox", 64, 64, **FEW, seed=5, output_type="np").images == expected).all()


def test_the_program_draws(folder: Path, tmp_path: Path) -> None:
    common = [f"model={folder}", "prompt=a fox", "seed=5", "grid=false", "sample=v1"]
    few = ["sample.prior_steps=2", "sample.decoder_steps=3", "height=64", "width=64"]
    arguments = [*common, *few, f"output_dir={tmp_path}", "device=cpu"]
    assert run_program("sample", arguments) == 0
    assert len(list(tmp_path.glob("*.png"))) == 1


@pytest.mark.parametrize("version", [1, 2])
def test_a_prior_of_the_other_version_is_refused(version: int, tmp_path: Path) -> None:
    first, second = v1_model(), v1_model()
    second.settings = {}
    second.parts["decoder"] = part(CONFIGS["decoder"])
    with_prior, without = (first, second) if version == 1 else (second, first)
    with_prior.parts = {"prior": with_prior.parts["prior"]}
    del without.parts["compressor"]
    for name, model in (("prior", with_prior), ("cascade", without)):
        registry.write_model(model, tmp_path / name, "native")
    source = {"source": str(tmp_path / "cascade"), "prior": str(tmp_path / "prior")}
    message = f"is a prior of version {version}, but the model has Stage B of version {3 - version}"
    with pytest.raises(ValueError, match=message):
        registry.read_model(**source)
    assert registry.read_model(**source, allow_mismatch=True)


def test_files_of_both_versions_in_a_folder_are_refused(tmp_path: Path) -> None:
    registry.write_model(v1_model(), tmp_path / "v1", "upstream")
    (tmp_path / "v1/model_stage_c.pt").rename(tmp_path / "v1/model_v3_stage_c.pt")
    for file in (tmp_path / "v1").glob("*.pt"):
        content = torch.load(file, weights_only=True)
        content["wuerstchen_pl"].pop("settings")
        torch.save(content, file)
    with pytest.raises(ValueError, match="contains files of both versions, model_stage_b"):
        registry.read_model(str(tmp_path / "v1"))
