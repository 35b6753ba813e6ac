"""The pipeline against diffusers': same weights and generators give the same images."""

import inspect
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, WuerstchenCombinedPipeline
from diffusers.pipelines.deprecated.wuerstchen import (
    PaellaVQModel,
    WuerstchenPrior,
    pipeline_wuerstchen_prior,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from scripts import reference_models
from wuerstchen_pl import DEFAULT_STAGE_C_TIMESTEPS, WuerstchenPipeline
from wuerstchen_pl.formats import hub, registry
from wuerstchen_pl.models.tokenizer import Tokenizer, write_vocabulary
from wuerstchen_pl.sampling.latent_decoder import LatentDecoderSampler
from wuerstchen_pl.sampling.prior import PriorSampler

TOLERANCE = 1e-4
FAST: dict[str, Any] = {"prior_num_inference_steps": 4, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return reference_models.combined(folder / "tokenizer")


@pytest.fixture(scope="module")
def pipeline(reference: Any, folder: Path) -> WuerstchenPipeline:
    decoder, prior = reference_models.save_pair(reference, folder)
    return WuerstchenPipeline.from_pretrained(str(decoder), prior=str(prior))


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(pipe: Any, prompt: Any = "a red heart", **options: Any) -> Tensor:
    options = {"height": 128, "width": 128, "generator": rng(), **FAST, **options}
    if isinstance(pipe, WuerstchenPipeline):
        options["progress"] = False
    return pipe(prompt, output_type="pt", **options).images


NEGATIVE = "negative_prompt_embeds"
LATENTS = torch.randn(1, 16, 3, 6, generator=rng(9))
CASES: dict[str, dict[str, Any]] = {
    "square": {},
    "wide": {"width": 384},
    "tall": {"height": 256},
    "no guidance": {"prior_guidance_scale": 1.0},
    "guidance below one": {"prior_guidance_scale": 0.0},
    "guided decoder": {"decoder_guidance_scale": 3.0},
    "negative prompt": {"negative_prompt": "a blue cube", "decoder_guidance_scale": 2.0},
    "published timesteps": {"prior_timesteps": DEFAULT_STAGE_C_TIMESTEPS},
    "timesteps of both": {
        "prior_timesteps": [1.0, 0.6, 0.5, 0.0],
        "decoder_timesteps": [1.0, 0.3, 0.1, 0.0],
    },
    "timesteps that stop early": {"prior_timesteps": [0.9, 0.5, 0.2]},
    "several images": {"num_images_per_prompt": 3, "decoder_guidance_scale": 2.0},
    "a generator each": {"num_images_per_prompt": 2, "generator": [rng(5), rng(6)]},
    "custom latents": {"latents": LATENTS, "width": 256},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_image_equals_diffusers(case: str, reference: Any, pipeline: WuerstchenPipeline) -> None:
    options = CASES[case]
    if isinstance(options.get("generator"), list):
        options = {**options, "generator": [rng(5), rng(6)]}
    expected = generate(reference, **options)
    if isinstance(options.get("generator"), list):
        options = {**options, "generator": [rng(5), rng(6)]}
    actual = generate(pipeline, **options)
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) < TOLERANCE
    assert 0.05 < float(expected.std()) < 0.4  # neither constant nor saturated


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": "a green frog"},
        {"prior_timesteps": [1.0, 0.8, 0.5, 0.2, 0.0]},
        {"decoder_timesteps": [1.0, 0.7, 0.3, 0.0]},
        {"prior_guidance_scale": 3.0},
        {"negative_prompt": "a blue cube"},
        {"generator": rng(4)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_each_compared_input_changes_the_image(changed: dict, pipeline: WuerstchenPipeline) -> None:
    difference = (generate(pipeline) - generate(pipeline, **changed)).abs().max()
    assert float(difference) > 20 * TOLERANCE


def test_the_decoder_reads_its_prompt_and_the_semantic_latents(
    pipeline: WuerstchenPipeline,
) -> None:
    def decoded(semantic: Tensor, prompt: str) -> Tensor:
        return pipeline.decoder(
            semantic, prompt, 3, generator=rng(), output_type="pt", progress=False
        ).images

    semantic = torch.randn(1, 16, 3, 3, generator=rng(1))
    before = decoded(semantic, "a red heart")
    assert float((before - decoded(semantic, "a green frog")).abs().max()) > 20 * TOLERANCE
    assert float((before - decoded(semantic * 0, "a red heart")).abs().max()) > 20 * TOLERANCE


def test_an_image_does_not_depend_on_the_other_prompts_of_a_list(
    reference: Any, pipeline: WuerstchenPipeline
) -> None:
    prompts = ["a red heart", "a green frog on a table"]
    together = generate(pipeline, prompts, generator=[rng(5), rng(6)], decoder_guidance_scale=2.0)
    for image, prompt, seed in zip(together, prompts, (5, 6), strict=True):
        for pipe in (pipeline, reference):
            alone = generate(pipe, prompt, generator=rng(seed), decoder_guidance_scale=2.0)[0]
            assert float((image - alone).abs().max()) < TOLERANCE


def test_several_images_per_prompt_are_in_the_order_of_the_prompts(
    pipeline: WuerstchenPipeline,
) -> None:
    options: dict[str, Any] = {"num_images_per_prompt": 2, "generator": None}
    together = generate(pipeline, ["a red heart", "a green frog"], seed=5, **options)
    alone = generate(pipeline, "a green frog", seed=7, **options)
    assert float((together[2:] - alone).abs().max()) < TOLERANCE


def test_text_embeddings_instead_of_prompts(reference: Any, pipeline: WuerstchenPipeline) -> None:
    width = reference_models.PRIOR["c_cond"]
    embeds, negative = torch.randn(2, 1, 77, width, generator=rng(8))
    options = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    expected, actual = (generate(pipe, None, **options) for pipe in (reference, pipeline))
    assert float((actual - expected).abs().max()) < TOLERANCE
    assert (
        float((generate(pipeline, None, prompt_embeds=embeds) - actual).abs().max())
        > 20 * TOLERANCE
    )


def test_the_prior_alone(reference: Any, pipeline: WuerstchenPipeline) -> None:
    options = {"height": 256, "num_inference_steps": 4, "negative_prompt": "blue"}
    expected = reference.prior_pipe("a red heart", generator=rng(), **options).image_embeddings
    actual = pipeline.prior(
        "a red heart", generator=rng(), progress=False, **options
    ).image_embeddings
    assert actual.shape == expected.shape == (1, 16, 6, 24)
    assert float((actual - expected).abs().max()) < TOLERANCE * float(expected.std())


@pytest.mark.parametrize("output_type", ["pt", "np", "pil", "latent"])
def test_the_decoder_alone(output_type: str, reference: Any, pipeline: WuerstchenPipeline) -> None:
    semantic = torch.randn(2, 16, 6, 3, generator=rng(1))
    options = {"num_inference_steps": 3, "output_type": output_type, "return_dict": False}
    expected = reference.decoder_pipe(semantic, "frog", generator=rng(), **options)
    actual = pipeline.decoder(semantic, "frog", generator=rng(), progress=False, **options)
    if output_type == "pil":
        expected, actual = (
            torch.stack([torch.from_numpy(np.array(image)) for image in part]).float() / 255
            for part in (expected, actual)
        )
    difference = torch.as_tensor(actual) - torch.as_tensor(expected)
    assert float(difference.abs().max()) < (1.5 / 255 if output_type == "pil" else TOLERANCE)


def test_callbacks_get_and_change_the_same_tensors(
    reference: Any, pipeline: WuerstchenPipeline
) -> None:
    def recording(seen: list[Tensor]) -> Callable[..., dict[str, Tensor]]:
        def callback(pipe: Any, i: int, t: Tensor, tensors: dict) -> dict[str, Tensor]:
            seen.append(torch.cat([tensors["latents"].flatten(), t.flatten(), torch.tensor([i])]))
            return {"latents": tensors["latents"] * 0.9}

        return callback

    runs: list[list[Tensor]] = []
    images = []
    for pipe in (reference, pipeline):
        seen: list[Tensor] = []
        callbacks = {"prior_callback_on_step_end": recording(seen)}
        callbacks["callback_on_step_end"] = recording(seen)
        images.append(generate(pipe, **callbacks))
        runs.append(seen)
    assert len(runs[0]) == len(runs[1]) == 7
    for expected, actual in zip(*runs, strict=True):
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert float((images[0] - images[1]).abs().max()) < TOLERANCE
    assert float((images[1] - generate(pipeline)).abs().max()) > 20 * TOLERANCE


def test_a_callback_changes_the_text(reference: Any, pipeline: WuerstchenPipeline) -> None:
    def callback(pipe: Any, i: int, t: Tensor, tensors: dict) -> dict[str, Tensor]:
        states = tensors["text_encoder_hidden_states"]
        assert torch.equal(states[1:] if i == 0 else states[1:] * 2**i, tensors[NEGATIVE])
        return {"text_encoder_hidden_states": states * 0.5}

    options = {
        "prior_callback_on_step_end": callback,
        "prior_callback_on_step_end_tensor_inputs": [
            "text_encoder_hidden_states",
            NEGATIVE,
        ],
    }
    expected, actual = (generate(pipe, **options) for pipe in (reference, pipeline))
    assert float((actual - expected).abs().max()) < TOLERANCE
    assert float((actual - generate(pipeline)).abs().max()) > 20 * TOLERANCE


def test_arguments_have_diffusers_names_order_and_defaults(
    reference: Any, pipeline: WuerstchenPipeline
) -> None:
    for their, our in (
        (type(reference), WuerstchenPipeline),
        (type(reference.prior_pipe), PriorSampler),
        (type(reference.decoder_pipe), LatentDecoderSampler),
    ):
        expected, actual = (
            {
                name: tuple(p.default) if isinstance(p.default, list) else p.default
                for name, p in inspect.signature(cls.__call__).parameters.items()
                if p.kind is p.POSITIONAL_OR_KEYWORD
            }
            for cls in (their, our)
        )
        if our is WuerstchenPipeline:  # the size is the model's own
            assert (expected["height"], expected["width"]) == (512, 512)
            expected |= {"height": None, "width": None}
        assert list(actual.items()) == list(expected.items())
    assert pytest.approx(pipeline_wuerstchen_prior.DEFAULT_STAGE_C_TIMESTEPS) == (
        DEFAULT_STAGE_C_TIMESTEPS
    )


def test_the_combined_folder_is_read(
    reference: Any, pipeline: WuerstchenPipeline, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path / "combined")
    combined = WuerstchenPipeline.from_pretrained(str(tmp_path / "combined"))
    assert torch.equal(generate(combined), generate(pipeline))


@pytest.mark.slow
def test_a_compiled_pipeline_generates_the_same(pipeline: WuerstchenPipeline, folder: Path) -> None:
    compiled = WuerstchenPipeline.from_pretrained(
        str(folder / "wuerstchen"), prior=str(folder / "wuerstchen-prior")
    ).compile(backend="aot_eager")
    assert float((generate(compiled) - generate(pipeline)).abs().max()) < TOLERANCE


def test_diffusers_loads_every_part_that_we_write(
    reference: Any, pipeline: WuerstchenPipeline, folder: Path, tmp_path: Path
) -> None:
    model = registry.read_model(str(folder / "wuerstchen"), prior=str(folder / "wuerstchen-prior"))
    registry.write_model(model, tmp_path / "native", "native")  # diffusers -> native -> diffusers
    registry.write_model(
        registry.read_model(str(tmp_path / "native")), tmp_path / "exported", "diffusers"
    )
    decoder, prior = (
        tmp_path / "exported" / "wuerstchen",
        tmp_path / "exported" / "wuerstchen-prior",
    )
    loaded = WuerstchenCombinedPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(decoder, subfolder="tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(decoder, subfolder="text_encoder"),
        decoder=WuerstchenDiffNeXt.from_pretrained(decoder, subfolder="decoder"),
        scheduler=DDPMWuerstchenScheduler.from_pretrained(decoder, subfolder="scheduler"),
        vqgan=PaellaVQModel.from_pretrained(decoder, subfolder="vqgan"),
        prior_tokenizer=CLIPTokenizer.from_pretrained(prior, subfolder="tokenizer"),
        prior_text_encoder=CLIPTextModel.from_pretrained(prior, subfolder="text_encoder"),
        prior_prior=WuerstchenPrior.from_pretrained(prior, subfolder="prior"),
        prior_scheduler=DDPMWuerstchenScheduler.from_pretrained(prior, subfolder="scheduler"),
    )
    assert torch.equal(generate(loaded), generate(reference))


@pytest.mark.slow
def test_the_written_vocabulary_of_open_clip_is_read_by_transformers(tmp_path: Path) -> None:
    write_vocabulary(tmp_path)
    reference, pipeline = CLIPTokenizer.from_pretrained(tmp_path), Tokenizer()
    reference.save_pretrained(tmp_path / "whole")  # as tokenizer.json
    for text in CAPTIONS:
        expected = reference(
            [text], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        for tokenizer in (pipeline, *(Tokenizer(folder=str(tmp_path / f)) for f in ("", "whole"))):
            ids, mask = tokenizer([text])
            assert torch.equal(ids, expected.input_ids), text
            assert torch.equal(mask, expected.attention_mask.bool()), text


def test_random_text_is_tokenized_as_by_transformers(tmp_path: Path) -> None:
    """Strings of pieces that are easily split differently: spaces, cases, special tokens."""
    write_vocabulary(tmp_path)
    reference, pipeline = CLIPTokenizer.from_pretrained(tmp_path), Tokenizer()
    pieces = [
        *"aB9 !'<|>\u03a3\u03c3e\u0301\x1c\x85\u00a0\u200b\t\n\u1e9e\u0130\u0661\u3000\ufb01",
        "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "'s", "'LL",
    ]  # fmt: skip
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 14)))
        expected = reference([text], padding="max_length", max_length=77, truncation=True)
        ids, mask = pipeline([text])
        assert ids.tolist() == expected.input_ids, repr(text)
        assert mask.long().tolist() == expected.attention_mask, repr(text)


CAPTIONS = [
    "", "a red heart", "A Bear's  42 ducks!!! & <b>&amp;</b>", "don't we'll I'VE it'd",
    "na\u00efve caf\u00e9 \u718a\u732b \U0001f43b", "\u2116 \u00bd \u0130stanbul \u00df",
    "e\u0301 \u201cquotes\u201d \u2026 \u2014", "tab\tnew\nline   ", "word " * 100, "x" * 300,
    "\u039f\u0394\u039f\u03a3 \u03a3\u03a3", "a\x1cb\x1d \x1e\x1f c\x85d\u2003e", "\u0130\u1e9e",
    "<|ENDOFTEXT|> <|StartOfText|>", "wow!<|endoftext|>!? more", "<|endoftext|>",
    "a<|startoftext|>b <|endoftext|><|endoftext|>", "<|endoftext|> word" * 60,
]  # fmt: skip

WITHOUT = """
import sys
sys.modules["diffusers"] = sys.modules["transformers"] = None
from wuerstchen_pl import WuerstchenPipeline
pipe = WuerstchenPipeline.from_pretrained(sys.argv[1], prior=sys.argv[2])
pipe("a red heart", 128, 128, 2, num_inference_steps=1, seed=0, progress=False)
"""


@pytest.mark.slow
def test_neither_diffusers_nor_transformers_is_needed(
    pipeline: WuerstchenPipeline, folder: Path
) -> None:
    paths = [str(folder / "wuerstchen"), str(folder / "wuerstchen-prior")]
    run = subprocess.run([sys.executable, "-c", WITHOUT, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("alone", [False, True])
def test_hub_ids_are_downloaded_without_pickles(
    alone: bool, pipeline: WuerstchenPipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(
        name: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert revision == ("main" if name == "warp-ai/wuerstchen" else None)
        assert not {"*.bin", "*.pt", "*", "*.pkl", "*.py"} & set(allow_patterns)
        return str(folder / name.removeprefix("warp-ai/"))

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    prior = None if alone else "warp-ai/wuerstchen-prior"
    pipe = WuerstchenPipeline.from_pretrained("warp-ai/wuerstchen", prior=prior, revision="main")
    assert torch.equal(generate(pipe), generate(pipeline))


def test_the_sample_command_generates_from_published_folders(
    pipeline: WuerstchenPipeline, folder: Path, tmp_path: Path, program: Callable[..., int]
) -> None:
    fast = ["sample.prior_steps=4", "sample.decoder_steps=3", "height=128", "width=128"]
    models = [f"model={folder / 'wuerstchen'}", f"prior={folder / 'wuerstchen-prior'}"]
    arguments = ["prompt=a red heart", "seed=3", "device=cpu", f"output_dir={tmp_path}"]
    assert program("sample", *models, *fast, *arguments) == 0
    (path,) = tmp_path.glob("*.png")
    actual = torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1) / 255
    expected = generate(pipeline, generator=[rng(3)])[0]
    assert float((actual - expected).abs().max()) < 0.51 / 255


def test_a_seed_replaces_generators_in_each_part(pipeline: WuerstchenPipeline) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "progress": False}
    by_seed, by_generator = (
        pipeline.prior("frog", 128, 128, **options, num_images_per_prompt=2, **seeding)[0]
        for seeding in ({"seed": 5}, {"generator": [rng(5), rng(6)]})
    )
    assert torch.equal(by_seed, by_generator)
    images = [
        pipeline.decoder(by_seed, "frog", output_type="pt", **options, **seeding).images
        for seeding in ({"seed": 5}, {"generator": [rng(5), rng(6)]})
    ]
    assert torch.equal(*images)
