"""Image inputs, arguments and device placement of the pipeline of a small trained cascade."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
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
    actual = pipe.reconstruct(image, generator=torch.Generator().manual_seed(3), **DECODE)
    assert greatest(actual, expected) == 0


def test_pil_images_and_tensors_are_equivalent(pipe: WuerstchenPipeline, image: Tensor) -> None:
    pil_image = to_pil(image[0])
    as_tensor = torch.tensor(np.asarray(pil_image)).permute(2, 0, 1)[None] / 255
    assert greatest(pipe.encode(pil_image), pipe.encode(as_tensor)) == 0
    assert greatest(pipe.encode([pil_image, pil_image])[1:], pipe.encode(as_tensor)) < 1e-5
    with_alpha = pil_image.convert("RGBA")
    assert greatest(pipe.encode(with_alpha), pipe.encode(pil_image)) == 0


def test_higher_strength_keeps_less_of_the_image(pipe: WuerstchenPipeline, image: Tensor) -> None:
    def generate(strength: float, source: Tensor = image) -> Tensor:
        return pipe.image_to_image("red apple", source, strength, **FAST)

    rng = torch.Generator().manual_seed(3)
    torch.randn((1, 16, 4, 3), generator=rng)  # Stage C's initial noise
    expected = pipe.decoder(
        pipe.encode(image), "red apple", size=(64, 48), generator=[rng], **DECODE
    )
    assert greatest(generate(0.0), expected) < 1e-5
    other = 1 - image
    changes = [greatest(generate(s), generate(s, other)) for s in (0.0, 0.5, 1.0)]
    assert changes[0] > changes[1] > changes[2]


def test_variations_use_no_prompt_and_no_guidance(pipe: WuerstchenPipeline, image: Tensor) -> None:
    both = torch.cat([image, 1 - image])
    options = {**FAST, "prior_guidance_scale": 0.0}
    expected = pipe.image_to_image(["", ""], both, 0.5, **options)
    assert greatest(pipe.vary(both, 0.5, **FAST), expected) == 0


def test_inpainting_keeps_pixels_outside_the_mask(pipe: WuerstchenPipeline, image: Tensor) -> None:
    mask = torch.zeros(1, 1, 64, 48)
    mask[..., 16:48, :24] = 1
    actual = pipe.inpaint("red apple", image, mask, **FAST)
    outside = mask.expand_as(image) == 0
    assert torch.equal(actual[outside], image[outside])
    assert greatest(actual, image) > 0.1
    unchanged = pipe.inpaint("red apple", image, torch.zeros_like(mask), **FAST)
    assert torch.equal(unchanged, image)


def test_inpainting_everything_is_text_to_image_over_noised_latents(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    options = {**FAST, "prior_sampler": "ddim", "decoder_sampler": "ddim"}
    actual = pipe.inpaint("red apple", image, torch.ones(1, 1, 64, 48), **options)
    # the initial image has almost no effect (its noise still advances the generator)
    other = pipe.inpaint("red apple", 1 - image, torch.ones(1, 1, 64, 48), **options)
    assert greatest(actual, image) > 0.1
    assert greatest(actual, other) < 0.2 * greatest(image, 1 - image)


def test_inpainting_keeps_latents_outside_the_mask(pipe: WuerstchenPipeline, image: Tensor) -> None:
    mask = torch.zeros(1, 1, 64, 48)
    mask[..., :16, :16] = 1  # one of the 4 x 3 semantic positions
    grid = pipe.prior.mask_for(mask, 64, 48)
    assert grid.flatten().tolist() == [1.0] + [0.0] * 11
    semantic = pipe.encode(image)
    inpainted = pipe.prior(
        "red apple", 64, 48, 4, image_embeddings=semantic, mask=grid, progress=False,
        generator=torch.Generator().manual_seed(0),
    )[0]  # fmt: skip
    kept = grid.expand_as(semantic) == 0
    torch.testing.assert_close(inpainted[kept], semantic[kept])
    assert greatest(inpainted, semantic) > 0.1


def test_uint8_and_transparent_images_are_converted(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    as_uint8 = (image * 255).round().to(torch.uint8)
    assert greatest(to_tensor(as_uint8), image) < 0.51 / 255
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert greatest(to_tensor(transparent), torch.ones(1, 3, 4, 4)) == 0


def test_images_are_decoded_as_in_training() -> None:
    """16-bit gray is scaled, not clipped, and an EXIF rotation is applied, masks included."""
    gray = Image.fromarray(np.full((4, 4), 30000, dtype=np.uint16))
    expected = torch.full((1, 3, 4, 4), round(30000 / 257) / 255)
    assert greatest(to_tensor(gray), expected) < 1e-6
    assert greatest(to_mask(gray), expected[:, :1]) < 1e-6
    rotated = Image.new("RGB", (4, 6))
    rotated.putpixel((0, 0), (255, 0, 0))
    rotated.getexif()[ExifTags.Base.Orientation] = 6  # a quarter turn clockwise
    upright = to_tensor(rotated)
    assert upright.shape == (1, 3, 4, 6)
    assert upright[0, 0, 0, -1] == 1
    assert greatest(to_mask(Image.new("RGB", (4, 4), "white")), torch.ones(1, 1, 4, 4)) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(2, 64, 48), r"\(2, 64, 48\) is not an image"),
        (torch.full((3, 8, 8), 2.0), "values from 2 to 2"),
        (3, "int is not an image"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], r"sizes \[\(8, 8\), \(8, 9\)\]"),
        ([], "use one or more of the same size"),
    ],
)
def test_invalid_images_are_rejected(wrong: Any, message: str, pipe: WuerstchenPipeline) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.encode(wrong)


def test_several_outputs_per_input_image(pipe: WuerstchenPipeline, image: Tensor) -> None:
    both = torch.cat([image, 1 - image])
    four = pipe.vary(both, 0.5, **FAST, num_images_per_prompt=2)
    last = pipe.vary(1 - image, 0.5, **{**FAST, "seed": 6})
    assert greatest(four[3:], last) < 1e-5
    twice = pipe.reconstruct(image, seed=3, num_images_per_prompt=2, **DECODE)
    assert greatest(twice[:1], pipe.reconstruct(image, seed=3, **DECODE)) < 1e-5


def test_the_decoder_accepts_the_priors_arrays(pipe: WuerstchenPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "progress": False}
    outputs = [
        pipe.prior("frog", 64, 64, latents=torch.zeros(1, 16, 4, 4), sampler="ddim",
                   output_type=kind, **options)["image_embeddings"]
        for kind in ("pt", "np")
    ]  # fmt: skip
    assert isinstance(outputs[1], np.ndarray)
    images = [
        pipe.decoder(semantic, generator=torch.Generator().manual_seed(0), **DECODE)
        for semantic in outputs
    ]
    assert greatest(*images) == 0


def test_a_mask_of_another_size_is_rejected(pipe: WuerstchenPipeline, image: Tensor) -> None:
    with pytest.raises(ValueError, match="the mask has 8 x 8 px, and the image 64 x 48"):
        pipe.inpaint("red apple", image, torch.ones(1, 1, 8, 8), **FAST)
    with pytest.raises(ValueError, match="output_type='latent' is unknown; use pil or np or pt"):
        pipe.reconstruct(image, output_type="latent")


def test_any_size_is_rounded_up_and_cropped(pipe: WuerstchenPipeline) -> None:
    with pytest.warns(
        UserWarning, match="50 x 70 px is not a multiple of 16; generating 64 x 80 px"
    ):
        cropped = pipe("red apple", 50, 70, **FAST)
    padded = pipe("red apple", 64, 80, **FAST)
    assert torch.equal(cropped, padded[..., 7:57, 5:75])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("red apple", 64, 80, **FAST)


def test_a_reconstruction_has_the_size_of_its_image(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    part = image[..., :50, :40]
    with pytest.warns(UserWarning, match="px and cropping"):
        assert pipe.reconstruct(part, seed=0, **DECODE).shape == part.shape


def test_a_truncated_prompt_is_warned_about(pipe: WuerstchenPipeline) -> None:
    with pytest.warns(UserWarning, match="reads 16 tokens; truncated: 'red heart'"):
        pipe("apple " * 14 + "red heart", 64, 64, **FAST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates_about_the_same(
    dtype: torch.dtype, cascade: Path, pipe: WuerstchenPipeline
) -> None:
    half = WuerstchenPipeline.from_pretrained(str(cascade / "c"), torch_dtype=dtype)
    assert {p.dtype for p in half.prior.prior.parameters()} == {dtype}
    actual, expected = (p("red apple", 64, 64, **FAST) for p in (half, pipe))
    error = float((actual.float() - expected).square().mean().sqrt())
    assert 0 < error < 0.1
    assert half.decoder.vqgan.scale_factor.dtype == torch.float32


def test_offloading_generates_the_same_with_one_network_on_the_device(
    cascade: Path, pipe: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    offloaded = WuerstchenPipeline.from_pretrained(str(cascade / "c"))
    names = {id(module): type(module).__name__ for module in offloaded.modules}
    moves: list[tuple[str, str]] = []
    real = nn.Module.to

    def recording(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if id(self) in names and isinstance(args[0], str | torch.device):
            moves.append((names[id(self)], "to CPU" if args[0] == "cpu" else "to device"))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", recording)
    offloaded.enable_model_cpu_offload(torch.device("cpu"))
    moves.clear()
    actual, expected = (p("red apple", 64, 64, **FAST) for p in (offloaded, pipe))
    assert greatest(actual, expected) < 1e-5
    order = ["TextEncoder", "Prior", "DiffNeXt", "VQGAN"]
    assert moves == [(name, to) for name in order for to in ("to device", "to CPU")]


def test_a_network_returns_to_the_cpu_after_an_error() -> None:
    placement, net = DevicePlacement(torch.device("meta"), offload=True), nn.Linear(2, 2)
    moves: list[str] = []
    net.to = lambda device: moves.append(str(device)) or net  # type: ignore[assignment, method-assign]
    with pytest.raises(KeyboardInterrupt), placement.on_device(net):
        raise KeyboardInterrupt
    assert moves == ["meta", "cpu"]


def test_invalid_stage_b_arguments_are_rejected_before_stage_c_runs(
    pipe: WuerstchenPipeline,
) -> None:
    steps: list[int] = []

    def count(owner: Any, step: int, t: Tensor, tensors: dict) -> None:
        steps.append(step)

    for invalid in (
        {"decoder_sampler": "euler"},
        {"decoder_timesteps": [0.1, 0.9]},
        {"decoder_guidance_scale": float("inf")},
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        {"output_type": "jpg"},
    ):
        with pytest.raises(ValueError, match=r".+"):
            pipe("a", 64, 64, **{**FAST, **invalid}, prior_callback_on_step_end=count)
    assert steps == []


def test_each_stage_shows_a_progress_bar(
    pipe: WuerstchenPipeline, capsys: pytest.CaptureFixture
) -> None:
    pipe("red apple", 64, 64, **{**FAST, "progress": True})
    stderr = capsys.readouterr().err
    assert "Stage C: 100%" in stderr
    assert "4/4" in stderr
    assert "Stage B: 100%" in stderr
    pipe("red apple", 64, 64, **FAST)
    assert capsys.readouterr().err == ""


def test_each_stage_has_its_own_sampler(pipe: WuerstchenPipeline) -> None:
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
    assert torch.equal(*again)  # DDIM from fixed latents needs no generator


def test_guidance_options_reach_stage_c(pipe: WuerstchenPipeline) -> None:
    seen: list[Tensor] = []

    def final_latents(**options: Any) -> Tensor:
        def keep(owner: Any, step: int, t: Tensor, tensors: dict) -> None:
            seen.append(tensors["latents"])

        pipe("red apple", 64, 64, **FAST, **options, prior_callback_on_step_end=keep)
        return seen[-1]

    strong = {"prior_guidance_scale": 50.0}
    plain = final_latents(**strong)
    assert greatest(plain, final_latents(**strong, prior_guidance_rescale=1.0)) > 1e-2
    assert greatest(plain, final_latents(**strong, prior_guidance_interval=(0.3, 0.6))) > 1e-2
    unguided = final_latents(**strong, prior_guidance_interval=(0.3, 0.31))  # contains no step
    assert greatest(unguided, final_latents(prior_guidance_scale=1.0)) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None}, "neither prompt nor prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 16, 16)}, "are both given"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "3 negative prompts for 2 prompts"),
        ({"prompt": 7}, "prompt=7 is not text"),
        ({"prompt": "a", "seed": [1, 2]}, "2 seeds for 1 image"),
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
        ({"prompt": "a", "height": 64.5}, "height=64.5 is not a whole number of pixels"),
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
def test_invalid_arguments_are_rejected(
    arguments: dict, message: str, pipe: WuerstchenPipeline
) -> None:
    options = {"height": 64, "width": 64, **FAST, **arguments}
    with pytest.raises(ValueError, match=message):
        pipe(**options)


def test_images_cannot_be_encoded_without_a_compressor(
    pipe: WuerstchenPipeline, image: Tensor
) -> None:
    without_compressor = WuerstchenPipeline(prior=pipe.prior, decoder=pipe.decoder)
    with pytest.raises(ValueError, match="this model has no compressor"):
        without_compressor.reconstruct(image)


def test_pil_images_are_returned(pipe: WuerstchenPipeline) -> None:
    images = pipe("red apple", 64, 48, **{**FAST, "output_type": "pil", "return_dict": True}).images
    expected = pipe("red apple", 64, 48, **FAST)
    assert isinstance(images[0], Image.Image)
    actual = torch.tensor(np.asarray(images[0])).permute(2, 0, 1) / 255
    assert greatest(actual, expected[0]) < 0.51 / 255


@pytest.mark.gpu
def test_the_gpu_generates_the_same_as_the_cpu(cascade: Path, pipe: WuerstchenPipeline) -> None:
    expected = pipe("red apple", 64, 64, **FAST)
    gpu = WuerstchenPipeline.from_pretrained(cascade / "c", device="cuda")
    assert greatest(gpu("red apple", 64, 64, **FAST).cpu(), expected) < 1e-2
    gpu.enable_model_cpu_offload()
    assert greatest(gpu("red apple", 64, 64, **FAST).cpu(), expected) < 1e-2
    assert {p.device.type for module in gpu.modules for p in module.parameters()} == {"cpu"}
