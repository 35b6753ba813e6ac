"""Conversions from the native format to another one and back are bit-exact and keep dtypes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.formats.conftest import SETTINGS, assert_bit_equal, random_model, tensors
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.model import STUDENT, Model, Part
from wuerstchen_pl.models.tokenizer import Tokenizer, write_vocabulary

TEXT = ("text_encoder", "prior_text_encoder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["native", "diffusers"])
def test_folder_formats_round_trip(
    format: registry.FormatName, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = random_model(dtype)
    model.settings = {**model.settings, STUDENT: 4.0}
    registry.write_model(model, tmp_path / "there", format)
    there = registry.read_model(str(tmp_path / "there"))
    registry.write_model(there, tmp_path / "back", "native")
    back = registry.read_model(str(tmp_path / "back"))
    assert_bit_equal(tensors(back), tensors(model))
    assert back.settings == model.settings
    for name, part in model.parts.items():
        assert back.parts[name].config == part.config


@pytest.mark.parametrize("format", ["native", "diffusers"])
@pytest.mark.parametrize(
    "kept", [["prior"], ["vqgan"], ["prior_text_encoder"], ["text_encoder"], ["compressor"]]
)
def test_single_parts_round_trip(
    kept: list[str], format: registry.FormatName, model: Model, tmp_path: Path
) -> None:
    part = Model({name: model.parts[name] for name in kept})
    registry.write_model(part, tmp_path / "there", format)
    assert_bit_equal(tensors(registry.read_model(str(tmp_path / "there"))), tensors(part))


def test_a_separate_stage_c_replaces_only_its_parts_and_settings(
    model: Model, tmp_path: Path
) -> None:
    other = random_model(torch.float16)
    other.settings = {**SETTINGS, "semantic_scale": 7.0, "latent_dim_scale": 5.0}
    for name, written in (("a", model), ("b", other)):
        registry.write_model(written, tmp_path / name, "native")
    registry.write_model(model, tmp_path / "c", "diffusers")
    for source in ("a", "c"):
        combined = registry.read_model(
            str(tmp_path / source), prior=str(tmp_path / "b"), allow_mismatch=True
        )
        assert combined.settings == {**SETTINGS, "semantic_scale": 7.0}
        expected = Model({**model.parts, **{n: other.parts[n] for n in registry.STAGE_C_PARTS}})
        assert_bit_equal(tensors(combined), tensors(expected))
    registry.write_model(Model({"vqgan": model.parts["vqgan"]}), tmp_path / "d", "native")
    with pytest.raises(ValueError, match="has no Stage C"):
        registry.read_model(str(tmp_path / "a"), prior=str(tmp_path / "d"))


def test_the_model_card_is_kept(model: Model, tmp_path: Path) -> None:
    with_card = Model({"vqgan": model.parts["vqgan"]}, card="# mine\n\nlicense: mit\n")
    registry.write_model(with_card, tmp_path / "there", "native")
    registry.write_model(
        registry.read_model(str(tmp_path / "there")), tmp_path / "again", "diffusers"
    )
    assert (tmp_path / "again" / "README.md").read_text() == with_card.card


def test_added_tokens_are_kept(model: Model, tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "added_tokens.json").write_text('{"<cat-toy>": 49408}')
    part = model.parts["text_encoder"]
    with_tokenizer = Part(part.config, part.tensors, tmp_path / "tokenizer")
    registry.write_model(Model({"text_encoder": with_tokenizer}), tmp_path / "there", "diffusers")
    registry.write_model(registry.read_model(str(tmp_path / "there")), tmp_path / "back", "native")
    back = registry.read_model(str(tmp_path / "back")).parts["text_encoder"].tokenizer
    tokenizer, plain = Tokenizer(folder=str(back)), Tokenizer()
    assert tokenizer.encode("a <cat-toy> here") == [
        *plain.encode("a"),
        49408,
        *plain.encode("here"),
    ]
    for literal in ("a<|endoftext|>b", "<end_of_text>"):
        assert tokenizer.encode(literal) == plain.encode(literal)
    assert plain.encode("a<|endoftext|>b")[1] == 49407


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_upstream_format_round_trips(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = random_model(dtype)
    model = Model({k: v for k, v in whole.parts.items() if k not in TEXT}, whole.settings)
    registry.write_model(model, tmp_path / "there", "upstream")
    back = registry.read_model(str(tmp_path / "there"))
    assert_bit_equal(tensors(back), tensors(model))
    assert back.settings == model.settings
    assert {name: part.config for name, part in back.parts.items()} == {
        name: part.config for name, part in model.parts.items()
    }


def test_arguments_of_published_upstream_files_are_inferred(model: Model, tmp_path: Path) -> None:
    # an upstream compressor is an EfficientNet; see test_key_map
    parts = {k: v for k, v in model.parts.items() if k not in (*TEXT, "compressor")}
    registry.write_model(Model(parts, model.settings), tmp_path / "there", "upstream")
    for path in (tmp_path / "there").glob("*.pt"):
        content = torch.load(path, weights_only=True)
        del content["wuerstchen_pl"]  # published files do not have it
        torch.save(content, path)
    inferred = registry.read_model(str(tmp_path / "there"))
    assert_bit_equal(tensors(inferred), tensors(Model(parts)))
    for name, part in parts.items():
        assert inferred.parts[name].config == {
            key: part.config[key] for key in inferred.parts[name].config
        }


@pytest.mark.parametrize("name", ["model_v3_stage_c.pt", "vqgan_f4_v1_500k.pt"])
def test_a_single_upstream_file_is_read(model: Model, name: str, tmp_path: Path) -> None:
    part = "prior" if "stage_c" in name else "vqgan"
    registry.write_model(Model({part: model.parts[part]}), tmp_path / "there", "upstream")
    read_back = registry.read_model(str(tmp_path / "there" / name))
    assert_bit_equal(tensors(read_back), tensors(Model({part: model.parts[part]})))


def test_written_files_equal_those_of_safetensors(model: Model, native_folder: Path) -> None:
    path = native_folder / "decoder" / "model.safetensors"
    state = load_file(path)
    expected = {name: lazy.load() for name, lazy in model.parts["decoder"].tensors.items()}
    assert_bit_equal(state, expected)
    again = path.parents[2] / "again.safetensors"
    save_file(expected, again, metadata={"format": "pt"})
    assert again.read_bytes() == path.read_bytes()


def test_shards_are_read(model: Model, native_folder: Path, tmp_path: Path) -> None:
    registry.write_model(registry.read_model(str(native_folder)), tmp_path / "sharded", "native")
    folder = tmp_path / "sharded" / "prior"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, shard_names in shards.items():
        save_file({name: state[name] for name in shard_names}, folder / shard)
    index = {"weight_map": {name: shard for shard, keys in shards.items() for name in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_bit_equal(tensors(registry.read_model(str(tmp_path / "sharded"))), tensors(model))
    (folder / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists two\.safetensors, which does not exist"):
        registry.read_model(str(tmp_path / "sharded"))


CONVERT = """
import resource, sys
from pathlib import Path
from wuerstchen_pl.formats.registry import read_model, write_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_model(read_model(sys.argv[1]), Path(sys.argv[2]), "diffusers")
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_part_of_a_billion_parameters_is_converted_in_bounded_memory(tmp_path: Path) -> None:
    """v2's Stage C in bfloat16, 2 GB: at most 3 GB above its size, as files are mapped."""
    make = (
        "import sys; from pathlib import Path; import torch;"
        "from tests.test_presets import part_config;"
        "from wuerstchen_pl.formats.registry import write_model;"
        "from wuerstchen_pl.formats.model import Model, Part, build_on_meta, with_defaults;"
        "from wuerstchen_pl.formats.lazy_tensors import LazyTensor;"
        "c = with_defaults(part_config('c', 'v2', 'prior'));"
        "s = build_on_meta(c).state_dict();"
        "t = {k: LazyTensor(tuple(v.shape), torch.bfloat16, lambda v=v: torch.zeros(v.shape,"
        " dtype=torch.bfloat16)) for k, v in s.items()};"
        "write_model(Model({'prior': Part(c, t)}), Path(sys.argv[1]), 'native')"
    )
    source, target = tmp_path / "native", tmp_path / "diffusers"
    subprocess.run([sys.executable, "-c", make, str(source)], check=True)
    size = (source / "prior" / "model.safetensors").stat().st_size
    assert size > 2 * 993_636_896
    output = subprocess.run(
        [sys.executable, "-c", CONVERT, str(source), str(target)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    before, after = (int(kilobytes) * 1024 for kilobytes in output.split())
    assert after - before < 3e9
    assert after < size + 3e9


def test_nothing_is_overwritten_or_partially_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(OSError, match="full could not be written: Directory not empty"):
        registry.write_model(model, tmp_path / "full", "native")

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wuerstchen_pl.formats.native.write_safetensors", full_disk)
    (tmp_path / "new.partial").mkdir()  # the user's
    with pytest.raises(OSError, match="new could not be written: No space left on device"):
        registry.write_model(model, tmp_path / "new", "native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "new.partial"]
