"""The programs for models on disk: export, convert and interpolate."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_program, small
from tests.formats.conftest import (
    CONFIGS,
    assert_bit_equal,
    random_model,
    random_part,
    tensors,
)
from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.checkpointing import load
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.model import Model
from wuerstchen_pl.io import atomic
from wuerstchen_pl.models.tokenizer import write_vocabulary
from wuerstchen_pl.programs.interpolate import interpolate

Program = Callable[..., int]


@pytest.fixture(scope="module")
def exported(cascade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model"
    assert run_program("export", [f"ckpt={cascade / 'c'}", f"to={path}", "license=mit"]) == 0
    return path


def test_an_exported_cascade_generates_the_same_image(cascade: Path, exported: Path) -> None:
    images = [
        WuerstchenPipeline.from_pretrained(str(path))(
            "red apple", 64, 64, 3, num_inference_steps=2, seed=1, output_type="pt", progress=False
        ).images
        for path in (cascade / "c", exported)
    ]
    assert torch.equal(*images)


def test_ema_weights_are_exported_or_raw_weights(
    program: Program, cascade: Path, exported: Path, tmp_path: Path
) -> None:
    path = load.find_checkpoint(cascade / "c")
    content = load.read_checkpoint(path)
    name = "prior.blocks.0.res.expand.weight"
    ema = load_file(exported / "prior" / "model.safetensors")[name.removeprefix("prior.")]
    assert torch.equal(ema, content["ema"]["shadow"][name])
    assert program("export", f"ckpt={path}", f"to={tmp_path / 'raw'}", "ema=false") == 0
    raw = load_file(tmp_path / "raw" / "prior" / "model.safetensors")[name.removeprefix("prior.")]
    assert torch.equal(raw, content["state_dict"][name])
    assert not torch.equal(raw, ema)
    decoder = "decoder/model.safetensors"  # frozen in Stage C
    assert_bit_equal(load_file(tmp_path / "raw" / decoder), load_file(exported / decoder))


@pytest.mark.slow
def test_the_tokenizer_of_a_run_is_exported(
    program: Program, cascade: Path, tmp_path: Path
) -> None:
    write_vocabulary(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "added_tokens.json").write_text('{"<cat-toy>": 49408}')
    stage_paths = [f"paths.stage_{stage}={cascade / stage}" for stage in "ab"]
    tokenizer = f"+stage.text_encoder.tokenizer={tmp_path / 'tokenizer'}"
    assert program("train", *small("c", tmp_path, steps=1), *stage_paths, tokenizer) == 0
    run = tmp_path / "default" / "c"
    assert program("export", f"ckpt={run}", f"to={tmp_path / 'model'}") == 0
    for source in (run, tmp_path / "model"):
        encoder = WuerstchenPipeline.from_pretrained(source).prior.text_encoder
        assert encoder.tokenizer.encode("<cat-toy>") == [49408]


def test_the_model_card_describes_the_training(cascade: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    rows = [line for line in card.splitlines() if line.startswith("| Stage")]
    assert [row.split(" | ")[0] for row in rows] == ["| Stage C", "| Stage B", "| Stage A"]
    assert all("| 4 | 4 | 0.001 | 64 | openmoji (limit=24)" in row for row in rows)
    assert atomic.sha256(load.find_checkpoint(cascade / "b"))[:12] in rows[1]
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")


def test_convert_reports_written_and_dropped_parts(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    registry.write_model(random_model(torch.float16), tmp_path / "native", "native")
    for format in ("diffusers", "upstream"):
        to = f"to={tmp_path / format}"
        if format == "upstream":
            with pytest.warns(UserWarning, match="cannot store prior_text_encoder and text_enc"):
                assert program("convert", f"from={tmp_path / 'native'}", to, "format=upstream") == 0
        else:
            assert program("convert", f"from={tmp_path / 'native'}", to, "format=diffusers") == 0
    report = capsys.readouterr().out
    count = sum(lazy.load().numel() for lazy in random_model().parts["prior"].tensors.values())
    assert f"prior                {count:15,d} numbers, float16" in report


def test_convert_adds_text_encoders_to_upstream_files(program: Program, tmp_path: Path) -> None:
    model = random_model()
    wide = {**CONFIGS["prior_text_encoder"], "width": 64, "num_heads": 1}  # 64 per head, as in CLIP
    model.parts["prior_text_encoder"] = random_part(wide)
    networks = {k: v for k, v in model.parts.items() if not k.endswith("text_encoder")}
    registry.write_model(Model(networks, model.settings), tmp_path / "upstream", "upstream")
    registry.write_model(model, tmp_path / "diffusers", "diffusers")
    clip = {
        name.removeprefix("tower."): lazy.load()
        for name, lazy in model.parts["prior_text_encoder"].tensors.items()
    }
    torch.save({**clip, "visual.proj": torch.zeros(1), "epoch": 3}, tmp_path / "clip.pt")
    text_encoders = [
        f"text_encoder={tmp_path / 'diffusers' / 'wuerstchen' / 'text_encoder'}",
        f"prior_text_encoder={tmp_path / 'clip.pt'}",
    ]
    arguments = (f"from={tmp_path / 'upstream'}", f"to={tmp_path / 'whole'}", *text_encoders)
    assert program("convert", *arguments) == 0
    converted = registry.read_model(str(tmp_path / "whole"))
    assert_bit_equal(tensors(converted), tensors(model))
    assert converted.parts["text_encoder"].config["activation"] == "quick_gelu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from=/no/such"], "to is missing; set to="),
        (["from=/no/such", "to=x"], "/no/such does not exist"),
        (["from=/no/such", "to=x", "format=onnx"], "format is 'onnx', and must be"),
    ],
)
def test_bad_conversions_end_with_one_line(
    arguments: list[str], message: str, program: Program, capsys: pytest.CaptureFixture
) -> None:
    assert program("convert", *arguments) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert message in stderr


def shifted(model: Model, by: float) -> Model:
    """The model with every float shifted by ``by``."""
    other = random_model()
    for part in other.parts.values():
        for name, lazy in part.tensors.items():
            if lazy.dtype.is_floating_point:
                tensor = lazy.load() + by
                part.tensors[name] = lazy._replace(load=lambda tensor=tensor: tensor)
    return other


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_interpolated_weights_lie_between(weight: float) -> None:
    first = random_model()
    between = tensors(interpolate(first, shifted(first, 2.0), weight))
    for name, tensor in tensors(first).items():
        expected = tensor + 2 * weight if tensor.is_floating_point() else tensor
        torch.testing.assert_close(between[name], expected)


def test_models_of_different_shapes_are_not_interpolated() -> None:
    first, second = random_model(), random_model()
    prior = second.parts["prior"].tensors
    prior["head.bias"] = prior["head.bias"]._replace(shape=(7,))
    with pytest.raises(ValueError, match=r"prior in b.*head\.bias is \(7,\)"):
        interpolate(first, second, 0.5)
    del second.parts["prior"]
    with pytest.raises(ValueError, match="use models with the same parts"):
        interpolate(first, second, 0.5)
    with pytest.raises(ValueError, match=r"weight=2\.0 is out of range"):
        interpolate(first, first, 2.0)


def test_the_program_interpolates_two_folders(
    program: Program, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first = random_model()
    for name, model in (("a", first), ("b", shifted(first, 1.0))):
        registry.write_model(model, tmp_path / name, "native")
    arguments = [
        f"{key}={tmp_path / folder}" for key, folder in (("a", "a"), ("b", "b"), ("to", "c"))
    ]
    assert program("interpolate", *arguments) == 0
    between = tensors(registry.read_model(str(tmp_path / "c")))
    torch.testing.assert_close(
        between["prior.head.weight"], tensors(first)["prior.head.weight"] + 0.5
    )
    assert program("interpolate", *arguments) == 1
    assert "already exists" in capsys.readouterr().err
