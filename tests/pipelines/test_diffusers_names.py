"""What users of diffusers type on a pipeline: it exists, or docs/diffusers.md lists it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import wuerstchen_pl
from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.formats import hub, registry
from wuerstchen_pl.formats.trained_stage import load_stage
from wuerstchen_pl.models.fingerprint import weights_fingerprint
from wuerstchen_pl.pipelines.loading import pipeline_from_stage

DOCS = Path(__file__).parents[2] / "docs/diffusers.md"
FAST: dict[str, Any] = {
    "height": 64, "width": 64, "prior_num_inference_steps": 3, "num_inference_steps": 2,
    "seed": 1, "output_type": "pt",
}  # fmt: skip
NAMES = {
    "save_pretrained", "push_to_hub", "from_pretrained", "components", "device", "dtype", "config",
    "load_lora_weights", "unload_lora_weights", "set_adapters", "fuse_lora",
    "load_textual_inversion", "unload_textual_inversion",
    "tokenizer", "encode_prompt", "set_progress_bar_config", "enable_model_cpu_offload", "to",
}  # fmt: skip
DIFFERENT = {
    "scheduler", "unfuse_lora", "enable_xformers_memory_efficient_attention",
    "enable_sequential_cpu_offload", "enable_attention_slicing", "enable_vae_slicing",
    "from_pipe", "prior_pipe", "decoder_pipe",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(cascade: Path) -> WuerstchenPipeline:
    return WuerstchenPipeline.from_pretrained(cascade / "c")


def test_each_name_exists_or_is_listed_as_a_difference() -> None:
    listed = set(re.findall(r"^\| `(\w+)", DOCS.read_text(), re.MULTILINE))
    assert listed >= DIFFERENT
    assert all(hasattr(WuerstchenPipeline, name) for name in NAMES)
    assert not any(hasattr(WuerstchenPipeline, name) for name in DIFFERENT)


@pytest.mark.parametrize("source", ["run", "saved"])
def test_a_saved_pipeline_generates_the_same(
    source: str, pipe: WuerstchenPipeline, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    saved = WuerstchenPipeline.from_pretrained(tmp_path / "saved")
    if source == "saved":  # as a pipeline of a model on disk is saved
        saved.save_pretrained(tmp_path / "again")
        saved = WuerstchenPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(saved("red apple", **FAST).images, pipe("red apple", **FAST).images)
    assert saved.config == pipe.config
    assert saved.config["prior"]["width"] == 16


def test_current_weights_are_saved_in_their_type(cascade: Path, tmp_path: Path) -> None:
    pipe = WuerstchenPipeline.from_pretrained(cascade / "c", dtype=torch.bfloat16)
    assert (pipe.dtype, pipe.device) == (torch.bfloat16, torch.device("cpu"))
    pipe.prior.prior.stem.weight.zero_()
    pipe.save_pretrained(tmp_path / "saved")
    model = registry.read_model(str(tmp_path / "saved"))
    weight = model.parts["prior"].tensors["stem.weight"].load()
    assert weight.dtype == torch.bfloat16
    assert not weight.any()


def test_a_pipeline_of_a_stage_in_training_is_not_saved(cascade: Path, tmp_path: Path) -> None:
    stage: Any = load_stage(source=cascade / "c", stage="c")
    shared: Any = pipeline_from_stage(stage)
    with pytest.raises(ValueError, match="shares the networks of a stage in training"):
        shared.save_pretrained(tmp_path / "saved")


def test_a_model_is_pushed_to_the_hub(
    pipe: WuerstchenPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            uploaded["token"] = token

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
            uploaded["private"] = private
            assert exist_ok
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            parts = registry.read_model(folder_path).parts
            uploaded["parts"] = parts.keys()

    monkeypatch.setattr(hub, "HfApi", Api)
    assert pipe.push_to_hub("me/mine", private=True, token="t") == "https://hub/me/mine"
    assert uploaded == {"token": "t", "private": True, "parts": pipe.components.keys()}


def test_components_and_repr_say_what_is_loaded(cascade: Path, pipe: WuerstchenPipeline) -> None:
    names = ["prior_text_encoder", "prior", "decoder", "vqgan", "compressor"]
    assert list(pipe.components) == names
    assert weights_fingerprint(pipe.components.values()) == weights_fingerprint(pipe.modules)
    lines = repr(pipe).splitlines()
    assert lines[0] == "WuerstchenPipeline on cpu in float32"
    prior = sum(p.numel() for p in pipe.prior.prior.parameters())
    assert f"  prior: Prior, {prior:,d} parameters" in lines
    assert lines[-1] == f"  source: {load.find_checkpoint(cascade / 'c')}"
    assert pipe.tokenizer is pipe.prior.text_encoder.tokenizer


def test_encoded_prompts_generate_what_the_prompts_do(pipe: WuerstchenPipeline) -> None:
    embeds, negative = pipe.encode_prompt(["red apple", "frog"], "sun")
    both = pipe(["red apple", "frog"], negative_prompt="sun", **FAST).images
    embeddings = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(pipe(**embeddings, **FAST).images, both)
    assert not torch.equal(both, pipe(["red apple", "frog"], **FAST).images)


def test_progress_bars_are_hidden_and_shown(cascade: Path, capsys: pytest.CaptureFixture) -> None:
    pipe = WuerstchenPipeline.from_pretrained(cascade / "c")
    pipe.set_progress_bar_config(disable=True)
    pipe("frog", **FAST)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    pipe("frog", **FAST)
    assert "Stage C" in capsys.readouterr().err


def test_images_are_given_as_paths_and_arrays(pipe: WuerstchenPipeline, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    expected = pipe.encode(Image.fromarray(pixels))
    for image in (path, str(path), pixels, pixels.astype(np.float32) / 255, pixels[None]):
        assert torch.equal(pipe.encode(image), expected)
    assert torch.equal(pipe.encode([path, pixels]), torch.cat([expected, expected]))
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        pipe.encode(tmp_path / "nothing.png")
    with pytest.raises(ValueError, match=r"\(64, 64\) is not an image; give PIL images, paths"):
        pipe.encode(pixels[..., 0])
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    size = {key: value for key, value in FAST.items() if key not in ("height", "width")}
    inpainted = pipe.inpaint("frog", path, mask, **size).images
    original = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    assert torch.equal(inpainted[..., :32], original[..., :32])
    assert not torch.equal(inpainted[..., 32:], original[..., 32:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_safetensors": False}, "would read pickles; remove it"),
        ({"revision": "main"}, r"revision=main is of a hub id, but .* is not; remove it"),
        (
            {"dtype": torch.bfloat16, "torch_dtype": torch.float32},
            r"dtype=torch.bfloat16 and torch_dtype=torch.float32 differ",
        ),
    ],
)
def test_options_that_do_not_apply_are_refused(
    options: dict[str, Any], message: str, cascade: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        WuerstchenPipeline.from_pretrained(cascade / "c", **options)


def test_the_package_lists_its_public_names_only() -> None:
    assert dir(wuerstchen_pl) == sorted(wuerstchen_pl.__all__)
    assert all(getattr(wuerstchen_pl, name) is not None for name in dir(wuerstchen_pl))
