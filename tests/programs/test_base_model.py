"""Fine-tuning from models in published formats: what is needed, found, refused and unchanged."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from tests.conftest import NO_PROFILE, SMALL_DATA, rendered_data, run_program
from tests.formats.conftest import CONFIGS, SETTINGS, assert_bit_equal, random_part, tensors
from wuerstchen_pl.checkpointing.allowed import instantiate_allowed
from wuerstchen_pl.checkpointing.load import find_checkpoint, read_checkpoint
from wuerstchen_pl.cli.config import conf_dir
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import Model, Part, with_defaults
from wuerstchen_pl.formats.run import read_run
from wuerstchen_pl.pipelines.wuerstchen import WuerstchenPipeline

STAGE_C, STAGE_B = ("prior", "prior_text_encoder"), ("decoder", "vqgan", "text_encoder")
SMALL = (
    "data=openmoji", *SMALL_DATA, "image_size=64", "trainer.max_steps=2",
    "trainer.accelerator=cpu", "logger=csv", "validate_every_steps=2", "checkpoint_every_steps=2",
    "callbacks.loss_by_timestep=null", "seed=1", "callbacks.sample_grids=null",
    "data.num_workers=0", *NO_PROFILE, f"paths.data={rendered_data()}",
)  # fmt: skip
UNCHANGED = "stage.optimizer.lr=1e-30"
"""Below the last bit of every weight."""


@pytest.fixture(scope="module")
def base() -> Model:
    """A small cascade with initialized networks."""
    parts = {}
    for number, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        network = instantiate_allowed(config)
        for parameter in network.parameters():  # some are 0 when they are initialized
            parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
        state = network.state_dict()
        parts[name] = Part(with_defaults(config), {k: in_memory(t) for k, t in state.items()})
    pixels = instantiate_allowed(CONFIGS["compressor"]).resolution_multiple
    scale = {"resolution_multiple": pixels, "latent_dim_scale": pixels / 4}
    return Model(parts, {**SETTINGS, **scale})


@pytest.fixture(scope="module")
def published(base: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files as they are published, and one with everything."""
    root = tmp_path_factory.mktemp("published")

    def part_of(*names: str) -> Model:
        return Model({name: base.parts[name] for name in names}, base.settings)

    registry.write_model(part_of(*STAGE_C), root / "prior", "diffusers")
    registry.write_model(part_of(*STAGE_B), root / "decoder", "diffusers")
    registry.write_model(part_of("prior"), root / "authors", "upstream")
    registry.write_model(part_of("decoder", "compressor"), root / "authors_b", "upstream")
    registry.write_model(base, root / "whole", "native")
    return root


def finetune(
    published: Path, root: Path, *keys: str, stage: str = "c", experiment: str = "finetune"
) -> Path:
    """Train; sources are relative to ``published``. Returns the run's folder."""
    choice = [f"stage={stage}", f"experiment={experiment}", f"paths.root={root}"]
    arguments = [*choice, *SMALL, *map(published_path, keys)]
    arguments = [a.replace("PUBLISHED", str(published)) for a in arguments]
    assert run_program("train", arguments) == 0
    return root / experiment / stage


def published_path(key: str) -> str:
    """``init_from=prior`` -> ``init_from=PUBLISHED/prior``."""
    name, _, value = key.partition("=")
    is_source = name in ("init_from", "encoders", "compressor", "decoder") and value != "null"
    return f"{name}=PUBLISHED/{value}" if is_source and not value.startswith("/") else key


def equal_parts(actual: Model, expected: Model, *names: str) -> None:
    assert_bit_equal(
        tensors(Model({name: actual.parts[name] for name in names})),
        tensors(Model({name: expected.parts[name] for name in names})),
    )


CASES = {
    "all in one": ["init_from=whole"],
    "as on the hub": [
        "init_from=prior", "compressor=authors_b/model_v2_stage_b.pt", "decoder=decoder",
    ],
    "without a decoder": ["init_from=prior", "compressor=authors_b", "decoder=null"],
    "the authors' files": [
        "init_from=authors/model_v3_stage_c.pt", "encoders=prior", "compressor=authors_b",
    ],
}  # fmt: skip


FAST = ("as on the hub",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in FAST else pytest.mark.slow) for c in CASES]
)
def test_a_prior_comes_back_bit_equal_where_nothing_was_trained(
    case: str, base: Model, published: Path, tmp_path: Path
) -> None:
    run = finetune(published, tmp_path, *CASES[case], UNCHANGED)
    config = OmegaConf.load(run / "config.yaml")
    assert (config.stage.semantic_scale, config.stage.semantic_shift) == (42.0, 1.0)
    content = read_checkpoint(find_checkpoint(run))
    assert {name.split(".")[0] for name in content["state_dict"]} == {"prior"}
    equal_parts(read_run(run), base, *STAGE_C, "compressor")
    to = tmp_path / "exported"
    arguments = [f"ckpt={run}", f"to={to}", "format=diffusers", "license=mit"]
    assert run_program("export", arguments) == 0
    equal_parts(registry.read_model(str(to)), base, *STAGE_C, "compressor")
    diffusers_prior: Any = WuerstchenPrior.from_pretrained(
        to / "wuerstchen-prior", subfolder="prior"
    )
    with torch.no_grad():
        assert float((diffusers_prior(*inputs()) - forward(base)).abs().max()) < 1e-5
    again = finetune(published, tmp_path / "again", f"init_from={to}", UNCHANGED)
    equal_parts(read_run(again), base, *STAGE_C, "compressor")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, 16, 3, 4, generator=rng),
        torch.tensor([0.3, 0.8]),
        torch.randn(2, 7, 16, generator=rng),
    )


def forward(model: Model) -> Tensor:
    network = instantiate_allowed(model.parts["prior"].config)
    network.load_state_dict({k: t.load() for k, t in model.parts["prior"].tensors.items()})
    with torch.no_grad():
        return network.eval()(*inputs())


@pytest.mark.parametrize("stage", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_stages_a_and_b_start_from_a_model_too(
    stage: str, base: Model, published: Path, tmp_path: Path
) -> None:
    keys = ["init_from=whole", "bucket_multiple=32", UNCHANGED]
    if stage == "a":
        features = "wuerstchen_pl.models.perceptual.RandomFeatures"
        keys += [
            "stage.discriminator.width=16", "stage.discriminator.depth=3",
            f"stage.perceptual._target_={features}",
            "~stage.perceptual.backbone", "+stage.perceptual.widths=[4,8]",
        ]  # fmt: skip
    run = finetune(published, tmp_path, *keys, stage=stage)
    parts = {"a": ("vqgan",), "b": ("decoder", "compressor", "text_encoder", "vqgan")}
    tuned = read_run(run)
    for part in parts[stage]:  # training updates the statistics of batch norms
        for name, lazy in base.parts[part].tensors.items():
            if "running" in name or "num_batches" in name:
                tuned.parts[part].tensors[name] = lazy
    equal_parts(tuned, base, *parts[stage])


@pytest.mark.slow
def test_training_changes_the_prior_alone_and_resumes_bit_for_bit(
    base: Model, published: Path, tmp_path: Path
) -> None:
    keys = [*CASES["as on the hub"], "stage.optimizer.lr=1e-3"]
    whole = finetune(published, tmp_path / "whole", *keys, "trainer.max_steps=4")
    first = ["trainer.max_steps=2", "stage.lr_schedule.total_steps=4"]
    half = finetune(published, tmp_path / "half", *keys, *first)
    (half / "checkpoints/step0000002.ckpt").rename(tmp_path / "step0000002.ckpt")
    resumed = finetune(
        published, tmp_path / "resumed", *keys, "trainer.max_steps=4",
        f"ckpt={tmp_path / 'step0000002.ckpt'}",
    )  # fmt: skip
    a, b = (read_checkpoint(find_checkpoint(run)) for run in (whole, resumed))
    for entry in ("state_dict", "ema"):
        left, right = (c["ema"]["shadow"] if entry == "ema" else c[entry] for c in (a, b))
        assert_bit_equal(left, right)
    actual = read_run(whole)
    equal_parts(actual, base, "prior_text_encoder", "compressor", *STAGE_B)
    changed = tensors(Model({"prior": actual.parts["prior"]}))
    before = tensors(Model({"prior": base.parts["prior"]}))
    assert sum(not torch.equal(changed[k], before[k]) for k in before) > len(before) / 2


SOURCES = {"c": CASES["as on the hub"], "b": ["init_from=whole", "bucket_multiple=32"]}
WITH_TEXT = ["text_adapter@stage.text_adapter=lora", "stage.text_encoder_lr=0.05"]
PRIOR = r"prior\..*(attention\.(qkv|out)|cond_mapper)\.w"
TEXT = r"prior_text_encoder.*attn\.(in_proj_|out_proj\.)w"
ADAPTERS: dict[str, tuple[str, list[str], str]] = {
    "c": ("c", [], PRIOR),
    "text too": ("c", WITH_TEXT, f"{PRIOR}|{TEXT}"),
    "text alone": ("c", [*WITH_TEXT, "stage.adapter=null"], TEXT),
    "b": ("b", [], r"decoder.*attention\.(qkv|out)\.w"),
    **{m: ("c", [f"stage.adapter.method={m}"], PRIOR) for m in ("dora", "loha", "lokr")},
}
"""Stage, keys and the names of the tensors that change."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c == "c" else pytest.mark.slow) for c in ADAPTERS],
)
def test_an_adapter_is_all_that_changes_and_resumes_bit_for_bit(
    case: str, base: Model, published: Path, tmp_path: Path
) -> None:
    stage, chosen, targets = ADAPTERS[case]
    keys = [*SOURCES[stage], "stage.optimizer.lr=0.1", *chosen]

    def run(name: str, *more: str) -> Path:
        more = (*keys, *more)
        return finetune(published, tmp_path / name, *more, stage=stage, experiment="lora")

    whole = run("whole", "trainer.max_steps=4")
    half = run("half", "trainer.max_steps=2", "stage.lr_schedule.total_steps=4")
    (half / "checkpoints/step0000002.ckpt").rename(tmp_path / "step0000002.ckpt")
    resumed = run("resumed", "trainer.max_steps=4", f"ckpt={tmp_path / 'step0000002.ckpt'}")
    a, b = (read_checkpoint(find_checkpoint(run)) for run in (whole, resumed))
    assert_bit_equal(a["state_dict"], b["state_dict"])
    assert_bit_equal(a["ema"]["shadow"], b["ema"]["shadow"])
    assert a["ema"]["shadow"].keys() == a["state_dict"].keys()
    assert all(re.search("lora_|hada_|lokr_", name) for name in a["state_dict"])
    changed, before = tensors(read_run(whole)), tensors(base)
    names = {name for name in changed if not torch.equal(changed[name], before[name])}
    assert names == {name for name in changed if re.search(targets, name)}


SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("b", "text too", "text alone")]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["c", *SLOW])
def test_an_exported_adapter_gives_the_images_of_its_run(
    case: str, published: Path, tmp_path: Path
) -> None:
    stage, chosen, _ = ADAPTERS[case]
    keys = [*SOURCES[stage], "stage.optimizer.lr=0.1", *chosen]
    run = finetune(published, tmp_path, *keys, stage=stage, experiment="lora")
    adapter = tmp_path / "adapter"
    assert run_program("export", [f"ckpt={run}", f"to={adapter}", "format=adapter"]) == 0
    assert sum(file.stat().st_size for file in adapter.iterdir()) < 300_000
    merged = [f"from={published / 'whole'}", f"lora=[{adapter}]", f"to={tmp_path / 'merged'}"]
    assert run_program("convert", merged) == 0
    converted, expected_model = registry.read_model(str(tmp_path / "merged")), read_run(run)
    equal_parts(converted, expected_model, *expected_model.parts)
    few: dict[str, Any] = {
        "height": 128, "width": 128, "seed": 3, "prior_num_inference_steps": 2,
        "num_inference_steps": 2, "output_type": "pt",
    }  # fmt: skip
    models = {"c": (published / "decoder", run), "b": (run, published / "prior")}[stage]
    tuned = WuerstchenPipeline.from_pretrained(models[0], prior=models[1])
    pipe = WuerstchenPipeline.from_pretrained(published / "decoder", prior=published / "prior")
    expected, untuned = tuned("red", **few).images, pipe("red", **few).images
    pipe.load_lora(adapter)
    torch.testing.assert_close(pipe("red", **few).images, expected, atol=1e-3, rtol=0)
    assert float((expected - untuned).abs().max()) > 0.01
    pipe.unload_lora()
    assert torch.equal(pipe("red", **few).images, untuned)
    pipe.load_lora_weights(adapter, adapter_name="red")
    pipe.set_adapters("red", 0.0)
    assert torch.equal(pipe("red", **few).images, untuned)


WORD = ["stage.words.text='<rex>'", "stage.words.init=face", "stage.words.num_vectors=2"]
TRIGGER = "data.captions.trigger='<rex>'"


@pytest.mark.slow
@pytest.mark.parametrize("stage", "bc")
def test_a_word_is_all_that_changes_and_resumes_bit_for_bit(
    stage: str, base: Model, published: Path, tmp_path: Path
) -> None:
    source = {"c": CASES["as on the hub"], "b": ["init_from=whole", "bucket_multiple=32"]}[stage]
    keys = [*source, *WORD, TRIGGER, "stage.optimizer.lr=0.1"]

    def run(name: str, *more: str) -> Path:
        more = (*keys, *more)
        return finetune(published, tmp_path / name, *more, stage=stage, experiment="token")

    whole = run("whole", "trainer.max_steps=4")
    half = run("half", "trainer.max_steps=2", "stage.lr_schedule.total_steps=4")
    (half / "checkpoints/step0000002.ckpt").rename(tmp_path / "step0000002.ckpt")
    resumed = run("resumed", "trainer.max_steps=4", f"ckpt={tmp_path / 'step0000002.ckpt'}")
    a, b = (read_checkpoint(find_checkpoint(run)) for run in (whole, resumed))
    assert_bit_equal(a["state_dict"], b["state_dict"])
    assert_bit_equal(a["ema"]["shadow"], b["ema"]["shadow"])
    assert a["ema"]["shadow"].keys() == a["state_dict"].keys() == {"words.0.vectors"}
    assert len(a["optimizer_states"][0]["state"]) == 1
    model = read_run(whole)
    equal_parts(model, base, *(STAGE_C if stage == "c" else ()), *STAGE_B, "compressor")
    encoder: Any = model.parts[{"c": "prior_text_encoder", "b": "text_encoder"}[stage]].network
    face = encoder.tower.token_embedding.weight[encoder.tokenizer.encode("face")]
    vectors = encoder.words[0].vectors.detach()
    assert bool((vectors != face).all())
    assert torch.equal(vectors, a["ema"]["shadow"]["words.0.vectors"])


@pytest.mark.slow
def test_an_exported_word_gives_the_images_of_its_run(published: Path, tmp_path: Path) -> None:
    keys = [*CASES["as on the hub"], *WORD, TRIGGER]
    keys += ["stage.optimizer.lr=3", "stage.lr_schedule.warmup_steps=0"]
    run, word = finetune(published, tmp_path, *keys, experiment="token"), tmp_path / "word"
    assert run_program("export", [f"ckpt={run}", f"to={word}", "format=words"]) == 0
    names = {"learned_embeds.safetensors", "rex.safetensors", "README.md"}
    assert {file.name for file in word.iterdir()} == names
    few: dict[str, Any] = {
        "height": 128, "width": 128, "seed": 3, "prior_num_inference_steps": 2,
        "num_inference_steps": 2, "output_type": "pt",
    }  # fmt: skip
    prompt = "red <rex>"
    learned = WuerstchenPipeline.from_pretrained(published / "decoder", prior=run)
    assert learned.words == ["<rex>"]
    pipe = WuerstchenPipeline.from_pretrained(published / "decoder", prior=published / "prior")
    expected, without = learned(prompt, **few).images, pipe(prompt, **few).images
    assert float((expected - without).abs().max()) > 0.01
    for path in (word, word / "rex.safetensors"):
        pipe.load_words(path)
        assert torch.equal(pipe(prompt, **few).images, expected)
        assert torch.equal(pipe.encode_prompt(prompt)[0], learned.encode_prompt(prompt)[0])
        pipe.unload_words()
        assert torch.equal(pipe(prompt, **few).images, without)
    model = [f"model={published / 'decoder'}", f"prior={published / 'prior'}", "height=128"]
    fast = ["width=128", "sample.prior_steps=2", "sample.decoder_steps=2", "seed=3"]
    sample = [*model, *fast, f"prompt={prompt}", f"output_dir={tmp_path / 'images'}"]
    assert run_program("sample", [*sample, f"words=[{word}]"]) == 0
    (file,) = (tmp_path / "images").glob("*.png")
    with Image.open(file) as image:
        assert json.loads(image.text["words"]) == [str(word)]  # type: ignore[attr-defined]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert float((pixels - expected[0]).abs().max()) < 0.01
    with pytest.warns(UserWarning, match="cannot store the word '<rex>' of the prior_text_encoder"):
        assert run_program("export", [f"ckpt={run}", f"to={tmp_path / 'model'}"]) == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "no caption has the word '<rex>' of stage.words.text"),
        (["data.captions.trigger='my <rex> '", "stage.words.text=zqzq"], "no caption has the word"),
        (
            ["stage.words.text=face", TRIGGER],
            "the word 'face' is a token of the vocabulary",
        ),
        (["stage.words.text=[aqz,AQZ]", TRIGGER], "the word 'AQZ' appears twice; remove one"),
        (["stage.words.init=*zzzzzz*", TRIGGER], "stage.words.init='[*]zzzzzz[*]' has no token"),
        (["stage.words.text=???"], "stage.words.text is missing; set"),
    ],
)
def test_a_word_that_cannot_be_learned_is_refused(
    keys: list[str], message: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    choice = ["stage=c", "experiment=token", f"paths.root={tmp_path}", *CASES["without a decoder"]]
    arguments = [published_path(key) for key in [*choice, *SMALL, *WORD, *keys]]
    assert run_program("train", [a.replace("PUBLISHED", str(published)) for a in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"error: .*{message}", error), error


@pytest.mark.slow
def test_an_adapter_is_trained_with_a_word_that_a_run_learned(
    published: Path, tmp_path: Path
) -> None:
    keys = [*CASES["as on the hub"], TRIGGER]
    learned = finetune(published, tmp_path, *keys, *WORD, experiment="token")
    keys = [f"init_from={learned}", *CASES["as on the hub"][1:], TRIGGER]
    adapted = finetune(published, tmp_path, *keys, experiment="lora")
    first, second = (
        WuerstchenPipeline.from_pretrained(published / "decoder", prior=run)
        for run in (learned, adapted)
    )
    assert second.words == ["<rex>"]
    assert torch.equal(first.encode_prompt("a <rex>")[0], second.encode_prompt("a <rex>")[0])


@pytest.mark.slow
def test_a_tuned_prior_draws_with_the_published_decoder(
    base: Model, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """As do a prior that was trained with a decoder, and its model card's command."""
    run = finetune(published, tmp_path, *CASES["without a decoder"], UNCHANGED)
    few: dict[str, Any] = {
        "height": 128, "width": 128, "seed": 3, "prior_num_inference_steps": 2,
        "num_inference_steps": 2, "output_type": "pt",
    }  # fmt: skip
    tuned = WuerstchenPipeline.from_pretrained(published / "decoder", prior=run)
    original = WuerstchenPipeline.from_pretrained(published / "decoder", prior=published / "prior")
    assert torch.equal(tuned("red", **few).images, original("red", **few).images)
    assert run_program("sample", [f"model={run}", "prompt=red"]) == 1
    message = capsys.readouterr().err
    assert "lacks decoder" in message
    assert "prior=" in message


REFUSED = {
    "no base": ([], "init_from is not set; set it to the model"),
    "no prior": (["init_from=decoder"], r"init_from=\S+ has no prior; set init_from to a model"),
    "no text encoder": (
        ["init_from=authors"], r"encoders=\S+ has no prior_text_encoder; set encoders to a model",
    ),
    "no compressor": (["init_from=prior"], r"compressor=\S+ has no compressor; set compressor to"),
    "no Stage B": (
        ["init_from=prior", "compressor=authors_b", "decoder=authors"], "has no Stages B and A",
    ),
    "no path": (["init_from=missing/model"], "missing/model does not exist"),
    "no network": (["+init_from=nobody/nothing"], "nobody/nothing is not a path and could not be"),
    "another text encoder": (
        ["init_from=prior", "compressor=authors_b", "encoders=wide"],
        "prior.text_dim=16, but text_encoder.width=8; set them equal",
    ),
    "a preset of other sizes": (
        ["init_from=whole", "preset=tiny", "paths.stage_b=PUBLISHED/whole"], "has other networks",
    ),
}  # fmt: skip


TUNING = [
    path.stem
    for path in Path(conf_dir(), "experiment").glob("*.yaml")
    if path.stem == "finetune" or "- finetune\n" in path.read_text()
]


@pytest.mark.parametrize("experiment", TUNING)
def test_without_a_base_model_no_experiment_tunes_one(
    experiment: str, capsys: pytest.CaptureFixture
) -> None:
    keys = ["stage=c", f"experiment={experiment}", "data=openmoji"]
    keys += ["stage.words.text=x"] if experiment == "token" else []
    assert run_program("train", keys) == 1
    assert "init_from is not set; set it to the model" in capsys.readouterr().err


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_is_one_sentence_with_its_key(
    case: str,
    published: Path,
    base: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    keys, message = REFUSED[case]
    if not (published / "wide").exists():
        wide = Model(
            {"prior_text_encoder": random_part(CONFIGS["prior_text_encoder"] | {"width": 8})}
        )
        registry.write_model(wide, published / "wide", "native")
    choice = ["stage=c", "experiment=finetune", f"paths.root={tmp_path}"]
    arguments = [*choice, *SMALL, *map(published_path, keys)]
    assert run_program("train", [a.replace("PUBLISHED", str(published)) for a in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "finetune").exists()


def test_losses_are_measured_without_a_decoder(published: Path, tmp_path: Path) -> None:
    run = finetune(published, tmp_path, *CASES["without a decoder"])
    to = tmp_path / "evaluated"
    arguments = [f"model={run}", f"output_dir={to}", "metric=[validation_loss]"]
    assert run_program("evaluate", arguments) == 0
    names = json.loads((to / "metrics.json").read_text())["metrics"].keys()
    assert {"stage_c/loss", "stage_c_train/loss"} <= names
    assert not any(name.startswith("stage_b") for name in names)
