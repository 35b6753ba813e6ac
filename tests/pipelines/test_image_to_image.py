"""What the pipeline makes of images, and where it works: on a small trained cascade."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.io.images import to_pil
from wuerstchen_pl.sampling.device import DevicePlacement
from wuerstchen_pl.sampling.images import to_mask, to_tensor

FAST: dict[str, Any] = {
    "prior_num_inference_steps": 4, "num_inference_steps": 2, "output_type": "pt",
    "return_dict": False, "progress": False, "seed": 3,
}  # fmt: skip
DECODE: dict[str, Any] = {
    "num_inference_steps": 2, "output_type": "pt", "return_dict": False, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(cascade: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.from_pretrained(str(cascade / "c"))


@pytest.fixture(scope="module")
def image() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 4, 4, generator=rng)
    return nn.functional.interpolate(coarse, size=(64, 48), mode="bilinear")


def greatest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_reconstruction_is_encode_and_decode(pipe: WuerstchenPipeline, image: Tensor) -> None:
    expected = pipe.decoder(
        pipe.encode(image), "", size=(64, 48), generator=torch.Generator().manual_seed(3), **DECODE
    )
    found = pipe.reconstruct(image, generator=torch.Generator().manual_seed(3), **DECODE)
    assert greatest(found, expected) == 0


def test_pil_images_and_tensors_are_read_alike(pipe: WuerstchenPipeline, image: Tensor) -> None:
    pil_image = to_pil(image[0])
    as_tensor = torch.tensor(np.asarray(pil_image)).permute(2, 0, 1)[None] / 255
    assert greatest(pipe.encode(pil_image), pipe.encode(as_tensor)) == 0
    assert greatest(pipe.encode([pil_image, pil_image])[1:], pipe.encode(as_tensor)) < 1e-5
    with_alpha = pil_image.convert("RGBA")
    assert greatest(pipe.encode(with_alpha), pipe.encode(pil_image)) == 0


def test_strength_goes_from_the_image_to_none_of_it(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    def drawn(strength: float, source: Tensor = image) -> Tensor:
        return pipe.image_to_image("red apple", source, strength, **FAST)

    rng = torch.Generator().manual_seed(3)
    torch.randn((1, 16, 4, 3), generator=rng)  # what starts Stage C
    expected = pipe.decoder(
        pipe.encode(image), "red apple", size=(64, 48), generator=[rng], **DECODE
    )
    assert greatest(drawn(0.0), expected) < 1e-5
    other = 1 - image
    changes = [greatest(drawn(s), drawn(s, other)) for s in (0.0, 0.5, 1.0)]
    assert changes[0] > changes[1] > changes[2]


def test_varying_asks_for_no_prompt_and_no_guidance(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    both = torch.cat([image, 1 - image])
    options = {**FAST, "prior_guidance_scale": 0.0}
    expected = pipe.image_to_image(["", ""], both, 0.5, **options)
    assert greatest(pipe.vary(both, 0.5, **FAST), expected) == 0


def test_inpainting_keeps_what_is_outside_the_mask(pipe: WuerstchenPipeline, image: Tensor) -> None:
    mask = torch.zeros(1, 1, 64, 48)
    mask[..., 16:48, :24] = 1
    found = pipe.inpaint("red apple", image, mask, **FAST)
    outside = mask.expand_as(image) == 0
    assert torch.equal(found[outside], image[outside])
    assert greatest(found, image) > 0.1
    nothing = pipe.inpaint("red apple", image, torch.zeros_like(mask), **FAST)
    assert torch.equal(nothing, image)


def test_inpainting_everything_is_text_to_image_over_noised_latents(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    options = {**FAST, "prior_sampler": "ddim", "decoder_sampler": "ddim"}
    found = pipe.inpaint("red apple", image, torch.ones(1, 1, 64, 48), **options)
    # ... of which one draw a step goes to the known latents, that nothing is taken of
    other = pipe.inpaint("red apple", 1 - image, torch.ones(1, 1, 64, 48), **options)
    assert greatest(found, image) > 0.1
    assert greatest(found, other) < 0.2 * greatest(image, 1 - image)


def test_what_inpainting_keeps_guides_what_it_draws(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    mask = torch.zeros(1, 1, 64, 48)
    mask[..., :16, :16] = 1  # one of the 4 x 3 semantic positions
    grid = pipe.prior.mask_for(mask, 64, 48)
    assert grid.flatten().tolist() == [1.0] + [0.0] * 11
    semantic = pipe.encode(image)
    drawn = pipe.prior(
        "red apple", 64, 48, 4, image_embeddings=semantic, mask=grid, progress=False,
        generator=torch.Generator().manual_seed(0),
    )[0]  # fmt: skip
    kept = grid.expand_as(semantic) == 0
    torch.testing.assert_close(drawn[kept], semantic[kept])
    assert greatest(drawn, semantic) > 0.1


def test_bytes_and_transparency_are_read_as_they_are_meant(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    as_bytes = (image * 255).round().to(torch.uint8)
    assert greatest(to_tensor(as_bytes), image) < 0.51 / 255
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert greatest(to_tensor(clear), torch.ones(1, 3, 4, 4)) == 0
    assert greatest(to_mask(Image.new("RGB", (4, 4), "white")), torch.ones(1, 1, 4, 4)) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2, 64, 48), r"\(2, 64, 48\) is not an image"),
        (torch.full((3, 8, 8), 2.0), "values from 2 to 2"),
        ("image.png", "str is not an image"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], r"sizes \[\(8, 8\), \(8, 9\)\]"),
        ([], "give one or more of one size"),
    ],
)
def test_what_is_no_image_is_refused(wrong: Any, message: str, pipe: WuerstchenPipeline) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.encode(wrong)


def test_several_images_of_several_images(pipe: WuerstchenPipeline, image: Tensor) -> None:
    both = torch.cat([image, 1 - image])
    four = pipe.vary(both, 0.5, **FAST, num_images_per_prompt=2)
    last = pipe.vary(1 - image, 0.5, **{**FAST, "seed": 6})
    assert greatest(four[3:], last) < 1e-5
    twice = pipe.reconstruct(image, seed=3, num_images_per_prompt=2, **DECODE)
    assert greatest(twice[:1], pipe.reconstruct(image, seed=3, **DECODE)) < 1e-5


def test_what_the_prior_gives_as_an_array_the_decoder_takes(pipe: WuerstchenPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "progress": False}
    drawn = [
        pipe.prior("frog", 64, 64, latents=torch.zeros(1, 16, 4, 4), sampler="ddim",
                   output_type=kind, **options)["image_embeddings"]
        for kind in ("pt", "np")
    ]  # fmt: skip
    assert isinstance(drawn[1], np.ndarray)
    images = [
        pipe.decoder(semantic, generator=torch.Generator().manual_seed(0), **DECODE)
        for semantic in drawn
    ]
    assert greatest(*images) == 0


def test_a_mask_of_another_size_is_refused(pipe: WuerstchenPipeline, image: Tensor) -> None:
    with pytest.raises(ValueError, match="the mask has 8 x 8 px, and the image 64 x 48"):
        pipe.inpaint("red apple", image, torch.ones(1, 1, 8, 8), **FAST)
    with pytest.raises(ValueError, match="output_type='latent' is unknown; use pil or np or pt"):
        pipe.reconstruct(image, output_type="latent")


def test_any_size_is_drawn_at_the_next_step_and_cropped(pipe: WuerstchenPipeline) -> None:
    with pytest.warns(
        UserWarning, match="50 x 70 px is not a multiple of 16; generating 64 x 80 px"
    ):
        found = pipe("red apple", 50, 70, **FAST)
    whole = pipe("red apple", 64, 80, **FAST)
    assert torch.equal(found, whole[..., 7:57, 5:75])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("red apple", 64, 80, **FAST)


def test_an_image_of_any_size_comes_back_in_it(pipe: WuerstchenPipeline, image: Tensor) -> None:
    part = image[..., :50, :40]
    with pytest.warns(UserWarning, match="px and cropping"):
        assert pipe.reconstruct(part, seed=0, **DECODE).shape == part.shape


def test_the_end_of_a_long_prompt_is_told(pipe: WuerstchenPipeline) -> None:
    with pytest.warns(UserWarning, match="reads 16 tokens; truncated: 'red heart'"):
        pipe("apple " * 14 + "red heart", 64, 64, **FAST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_about_the_same(
    dtype: torch.dtype, cascade: Path, pipe: WuerstchenPipeline
) -> None:
    half = WuerstchenPipeline.from_pretrained(str(cascade / "c"), torch_dtype=dtype)
    assert {p.dtype for p in half.prior.prior.parameters()} == {dtype}
    found, expected = (p("red apple", 64, 64, **FAST) for p in (half, pipe))
    error = float((found.float() - expected).square().mean().sqrt())
    assert 0 < error < 0.1
    assert half.decoder.vqgan.scale_factor.dtype == torch.float32


def test_offloading_draws_the_same_with_one_part_at_work(
    cascade: Path, pipe: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean = WuerstchenPipeline.from_pretrained(str(cascade / "c"))
    names = {id(module): type(module).__name__ for module in lean.modules}
    moves: list[tuple[str, str]] = []
    real = nn.Module.to

    def recording(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if id(self) in names and isinstance(args[0], str | torch.device):
            moves.append((names[id(self)], "away" if args[0] == "cpu" else "to work"))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", recording)
    lean.enable_model_offload(torch.device("cpu"))
    moves.clear()
    assert greatest(lean("red apple", 64, 64, **FAST), pipe("red apple", 64, 64, **FAST)) < 1e-5
    order = ["TextEncoder", "Prior", "DiffNeXt", "VQGAN"]
    assert moves == [(name, to) for name in order for to in ("to work", "away")]


def test_a_part_goes_back_even_if_it_failed() -> None:
    place, net = DevicePlacement(torch.device("meta"), offload=True), nn.Linear(2, 2)
    moves: list[str] = []
    net.to = lambda device: moves.append(str(device)) or net  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt), place.on_device(net):
        raise KeyboardInterrupt
    assert moves == ["meta", "cpu"]


def test_bad_stage_b_arguments_are_refused_before_stage_c_works(
    pipe: WuerstchenPipeline,
) -> None:
    steps: list[int] = []

    def count(owner: Any, step: int, t: Tensor, tensors: dict) -> None:
        steps.append(step)

    for wrong in (
        {"decoder_sampler": "euler"},
        {"decoder_timesteps": [0.1, 0.9]},
        {"decoder_guidance_scale": float("inf")},
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        {"output_type": "jpg"},
    ):
        with pytest.raises(ValueError, match=r".+"):
            pipe("a", 64, 64, **{**FAST, **wrong}, prior_callback_on_step_end=count)
    assert steps == []


def test_a_bar_for_each_stage(pipe: WuerstchenPipeline, capsys: pytest.CaptureFixture) -> None:
    pipe("red apple", 64, 64, **{**FAST, "progress": True})
    told = capsys.readouterr().err
    assert "Stage C: 100%" in told
    assert "4/4" in told
    assert "Stage B: 100%" in told
    pipe("red apple", 64, 64, **FAST)
    assert capsys.readouterr().err == ""


def test_the_samplers_are_of_both_stages(pipe: WuerstchenPipeline) -> None:
    both = {"prior_sampler": "ddim", "decoder_sampler": "ddim"}
    plain, one, two = (
        pipe("red apple", 64, 64, **FAST, **options)
        for options in ({}, {"prior_sampler": "ddim"}, both)
    )
    assert greatest(plain, one) > 1e-3
    assert greatest(one, two) > 1e-3
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    again = [
        pipe.prior("frog", 64, 64, 4, latents=latents, sampler="ddim", progress=False)[0]
        for _ in range(2)
    ]
    assert torch.equal(*again)  # no generator was given: none is needed


def test_guidance_options_reach_stage_c(pipe: WuerstchenPipeline) -> None:
    seen: list[Tensor] = []

    def latents_of(**options: Any) -> Tensor:
        def keep(owner: Any, step: int, t: Tensor, tensors: dict) -> None:
            seen.append(tensors["latents"])

        pipe("red apple", 64, 64, **FAST, **options, prior_callback_on_step_end=keep)
        return seen[-1]

    strong = {"prior_guidance_scale": 50.0}
    plain = latents_of(**strong)
    assert greatest(plain, latents_of(**strong, prior_guidance_rescale=1.0)) > 1e-2
    assert greatest(plain, latents_of(**strong, prior_guidance_interval=(0.3, 0.6))) > 1e-2
    never = latents_of(**strong, prior_guidance_interval=(0.3, 0.31))  # between two steps
    assert greatest(never, latents_of(prior_guidance_scale=1.0)) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "neither prompt nor prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 16, 16)}, "are both given"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "3 negative prompts for 2 prompts"),
        ({"prompt": 7}, "prompt=7 is not text"),
        ({"prompt": "a", "seed": [1, 2]}, "2 seeds for 1 images"),
        ({"prompt": "a", "height": 8}, "height=8 is not supported"),
        ({"prompt": "a", "latents": torch.zeros(1, 16, 9, 9)}, r"latents have shape \(1, 16, 9"),
        ({"prompt": "a", "output_type": "jpg"}, "output_type='jpg' is unknown"),
        ({"prompt": "a", "prior_timesteps": [0.1, 0.5]}, "are not decreasing in"),
        ({"prompt": "a", "prior_num_inference_steps": 0}, "steps=0 is not a positive integer"),
        ({"prompt": "a", "prior_guidance_scale": float("nan")}, "guidance_scale=nan is not finite"),
        ({"prompt": "a", "decoder_sampler": "euler"}, "sampler='euler' is unknown"),
        ({"prompt": []}, r"prompt=\[\] is not text"),
        ({"prompt": "a", "negative_prompt": 3}, "negative_prompt=3 is not text"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt=0 is out of range"),
        ({"prompt": "a", "prior_num_inference_steps": 2.5}, "steps=2.5 is not a positive integer"),
        ({"prompt": "a", "height": 64.5}, "height=64.5 is not supported"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 7)}, r"have shape \(1, 16, 7\)"),
        ({"prompt": "a", "negative_prompt_embeds": torch.zeros(2, 16, 16)}, r"shape \(2, 16, 16"),
        ({"prompt": "a", "strength": 0.3}, "strength and mask need image_embeddings"),
        ({"prompt": "a", "prior_sampler": "euler"}, "sampler='euler' is unknown"),
        (
            {"prompt": "a", "strength": 2.0, "image_embeddings": torch.zeros(1, 16, 4, 4)},
            "strength=2.0 is out of range",
        ),
        (
            {"prompt": "a", "image_embeddings": torch.zeros(2, 16, 4, 4)},
            r"image_embeddings have shape \(2, 16, 4, 4\)",
        ),
        (
            {"prompt": "a", "callback_on_step_end_tensor_inputs": ["noise"]},
            "callback_on_step_end_tensor_inputs='noise' is unknown; choose from latents",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_in_one_sentence(
    arguments: dict, message: str, pipe: WuerstchenPipeline
) -> None:
    options = {"height": 64, "width": 64, **FAST, **arguments}
    with pytest.raises(ValueError, match=message):
        pipe(**options)


def test_images_cannot_be_read_without_a_compressor(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    without = WuerstchenPipeline(prior=pipe.prior, decoder=pipe.decoder)
    with pytest.raises(ValueError, match="this model has no compressor"):
        without.reconstruct(image)


def test_pil_images_come_out(pipe: WuerstchenPipeline) -> None:
    images = pipe("red apple", 64, 48, **{**FAST, "output_type": "pil", "return_dict": True}).images
    expected = pipe("red apple", 64, 48, **FAST)
    assert isinstance(images[0], Image.Image)
    found = torch.tensor(np.asarray(images[0])).permute(2, 0, 1) / 255
    assert greatest(found, expected[0]) < 0.51 / 255


@pytest.mark.gpu
def test_the_gpu_draws_what_the_cpu_draws(cascade: Path, pipe: WuerstchenPipeline) -> None:
    expected = pipe("red apple", 64, 64, **FAST)
    gpu = WuerstchenPipeline.from_pretrained(cascade / "c", device="cuda")
    assert greatest(gpu("red apple", 64, 64, **FAST).cpu(), expected) < 1e-2
    gpu.enable_model_offload()
    assert greatest(gpu("red apple", 64, 64, **FAST).cpu(), expected) < 1e-2
    assert {p.device.type for module in gpu.modules for p in module.parameters()} == {"cpu"}
