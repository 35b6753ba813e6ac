"""Invalid and malicious model files are rejected with clear messages and without running code."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.model import Model, build_network
from wuerstchen_pl.models.tokenizer import write_vocabulary


@pytest.fixture
def copy(native_folder: Path, tmp_path: Path) -> Path:
    """A copy of the native model, to be modified."""
    return Path(shutil.copytree(native_folder, tmp_path / "copy"))


def change_tensors(path: Path, change: Callable[[dict], None]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_every_mismatch_of_tensors_is_listed(copy: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state["stem.weight"], state["head.bias"]
        state["strange.weight"] = torch.zeros(1)
        state["text_in.bias"] = torch.zeros(5)

    change_tensors(copy / "prior" / "model.safetensors", change)
    with pytest.raises(ValueError, match="does not match the expected tensors") as caught:
        registry.read_model(str(copy))
    message = str(caught.value)
    assert "missing: head.bias, stem.weight" in message
    assert "unexpected: strange.weight" in message
    assert "wrong shape: text_in.bias is (5,), expected (128,)" in message


def test_mismatches_are_listed_by_external_names(model: Model, tmp_path: Path) -> None:
    registry.write_model(model, tmp_path / "there", "diffusers")
    folder = tmp_path / "there" / "wuerstchen-prior" / "prior"

    def change(state: dict[str, torch.Tensor]) -> None:
        del state["blocks.2.attention.to_k.weight"]
        state["lora.up"] = torch.zeros(1)

    change_tensors(folder / "diffusion_pytorch_model.safetensors", change)
    with pytest.raises(ValueError, match="does not match the expected tensors") as caught:
        registry.read_model(str(tmp_path / "there"))
    assert "missing: blocks.2.attention.to_k.weight" in str(caught.value)
    assert "unexpected: lora.up" in str(caught.value)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_malicious_pickle_is_rejected_and_runs_no_code(tmp_path: Path) -> None:
    for name, save in (("new.pt", torch.save), ("old.pt", dump)):
        save({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / name)
        with pytest.raises(ValueError, match="more than tensors and plain values; use another"):
            registry.read_model(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def dump(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "is not a prior; use another file"),
        ("wuerstchen_pl.formats.trained_stage.load_stage", "is not a prior"),
        ("wuerstchen_pl.models.vqgan.VQGAN", "is not a prior"),
        (["a"], "is not a prior"),
    ],
)
def test_a_config_can_only_build_its_network(target: str, message: str, copy: Path) -> None:
    change_json(copy / "prior" / "config.json", _target_=target)
    with pytest.raises(ValueError, match=message):
        registry.read_model(str(copy))


@pytest.mark.parametrize(
    "backbone",
    [
        {
            "_target_": "wuerstchen_pl.formats.trained_stage.load_stage",
            "source": "/etc/passwd",
            "stage": "a",
        },
        [{"_target_": "os.system"}],
    ],
)
def test_nested_configs_can_only_build_networks(backbone: Any, copy: Path) -> None:
    change_json(copy / "compressor" / "config.json", backbone=backbone)
    with pytest.raises(ValueError, match="is not a network"):
        registry.read_model(str(copy))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_partial_": True}, "has the key _partial_, which is not allowed"),
        ({"depth": 10**8}, "has depth=100000000, but the file has only"),
        ({"width": -1}, r"config\.json cannot be used: RuntimeError"),
        ({"color": "red"}, r"config\.json cannot be used: color is not an argument of"),
        ({"num_heads": 7}, "num_heads=7 does not divide the width 128"),
    ],
)
def test_invalid_configs_are_rejected(values: dict, message: str, copy: Path) -> None:
    change_json(copy / "prior" / "config.json", **values)
    with pytest.raises(ValueError, match=message):
        registry.read_model(str(copy))


def test_a_config_cannot_name_local_files(copy: Path, model: Model, tmp_path: Path) -> None:
    """Opening the named pipe would hang."""
    os.mkfifo(tmp_path / "pipe")
    pipe = str(tmp_path / "pipe")
    change_json(copy / "text_encoder" / "config.json", weights=pipe, tokenizer=pipe)
    config = registry.read_model(str(copy)).parts["text_encoder"].config
    assert config["weights"] is config["tokenizer"] is None
    compressor = {"compressor": model.parts["compressor"], "vqgan": model.parts["vqgan"]}
    registry.write_model(Model(compressor), tmp_path / "there", "diffusers")
    config_file = tmp_path / "there" / "wuerstchen" / "compressor" / "config.json"
    backbone = {**json.loads(config_file.read_text())["backbone"], "weights": pipe}
    change_json(config_file, backbone=backbone)
    with pytest.raises(
        ValueError, match=r"backbone\.weights is not an argument"
    ):  # a ConvBackbone has no argument weights
        registry.read_model(str(tmp_path / "there"))


def test_settings_of_every_format_are_checked(model: Model, tmp_path: Path) -> None:
    part = {"vqgan": model.parts["vqgan"]}
    registry.write_model(Model(part, model.settings), tmp_path / "a", "diffusers")
    index = tmp_path / "a" / "wuerstchen" / "model_index.json"
    change_json(index, latent_dim_scale=None)
    registry.write_model(Model(part, {"resolution_multiple": 0.0}), tmp_path / "b", "upstream")
    registry.write_model(Model(part), tmp_path / "c", "upstream")
    path = tmp_path / "c" / "vqgan_f4_v1_500k.pt"
    torch.save({**torch.load(path, weights_only=True), "wuerstchen_pl": 3}, path)
    for folder, message in (("a", "settings="), ("b", "settings="), ("c", "which is not a dict")):
        with pytest.raises(ValueError, match=message):
            registry.read_model(str(tmp_path / folder))


def test_settings_must_be_positive_numbers(copy: Path) -> None:
    for settings in ({"semantic_scale": "42"}, {"color": 1.0}, None, {"resolution_multiple": 0}):
        change_json(copy / "wuerstchen_pl.json", settings=settings)
        with pytest.raises(ValueError, match=r"has settings=|settings is null, and must be"):
            registry.read_model(str(copy))


def test_a_shard_index_is_checked(copy: Path) -> None:
    weights = copy / "prior" / "model.safetensors"
    names = list(load_file(weights))
    shutil.move(weights, copy / "prior" / "one.safetensors")
    index = copy / "prior" / "model.safetensors.index.json"
    incomplete = {"weight_map": dict.fromkeys(names[1:], "one.safetensors")}
    index.write_text(json.dumps(incomplete))
    with pytest.raises(ValueError, match=f"does not list tensors of its shards: {names[0]}"):
        registry.read_model(str(copy))
    for broken in ({}, {"weight_map": 3}, {"weight_map": dict.fromkeys(names, index.name)}):
        index.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="is not a shard index"):
            registry.read_model(str(copy))


def test_two_versions_of_stage_b_in_one_folder_are_rejected(model: Model, tmp_path: Path) -> None:
    registry.write_model(Model({"decoder": model.parts["decoder"]}), tmp_path / "there", "upstream")
    stage_b = tmp_path / "there" / "model_v2_stage_b.pt"
    shutil.copy(stage_b, stage_b.with_name("model_stage_b.pt"))
    with pytest.raises(
        ValueError, match=r"two versions of Stage B, model_v2_stage_b\.pt and model_st"
    ):
        registry.read_model(str(tmp_path / "there"))


def test_a_state_dict_of_other_values_is_rejected(tmp_path: Path) -> None:
    torch.save({"state_dict": {"projection.weight": 3}}, tmp_path / "prior.pt")
    with pytest.raises(ValueError, match="contains more than named tensors"):
        registry.read_model(str(tmp_path / "prior.pt"))


def test_a_broken_tokenizer_is_named(copy: Path, model: Model) -> None:
    folder = copy / "text_encoder" / "tokenizer"
    write_vocabulary(folder)
    for name, content in (("vocab.json", "[1, 2]"), ("vocab.json", "{}"), ("merges.txt", "a b c")):
        write_vocabulary(folder)
        (folder / name).write_text(content)
        with pytest.raises(
            ValueError, match=r"is not a tokenizer: |/(vocab|merges)\.\w+ cannot be used: "
        ):
            build_network(registry.read_model(str(copy)).parts["text_encoder"])


def test_swapped_text_encoders_are_rejected(model: Model, tmp_path: Path) -> None:
    parts = dict(model.parts)
    parts["text_encoder"], parts["prior_text_encoder"] = (
        parts["prior_text_encoder"], parts["text_encoder"],
    )  # fmt: skip
    registry.write_model(Model(parts, model.settings), tmp_path / "swapped", "native")
    with pytest.raises(ValueError, match=r"the prior reads text of 16 channels, .* gives 12"):
        WuerstchenPipeline.from_pretrained(tmp_path / "swapped")


def test_a_shard_index_cannot_name_files_elsewhere(copy: Path, tmp_path: Path) -> None:
    weights = copy / "prior" / "model.safetensors"
    shutil.move(weights, tmp_path / "elsewhere.safetensors")
    names = load_file(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../../elsewhere.safetensors")}
    (copy / "prior" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FileNotFoundError, match=r"lists elsewhere\.safetensors, which does not exist"
    ):
        registry.read_model(str(copy))


def test_damaged_files_are_named(copy: Path) -> None:
    weights = copy / "vqgan" / "model.safetensors"
    whole, config = weights.read_bytes(), copy / "vqgan" / "config.json"
    weights.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"vqgan.model\.safetensors is damaged"):
        registry.read_model(str(copy))
    weights.write_bytes(whole)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"vqgan.config\.json is not JSON"):
        registry.read_model(str(copy))
    shutil.rmtree(copy / "vqgan")
    with pytest.raises(FileNotFoundError, match="vqgan"):
        registry.read_model(str(copy))


def test_later_versions_and_unknown_parts_are_rejected(copy: Path) -> None:
    change_json(copy / "wuerstchen_pl.json", parts=["upscaler"])
    with pytest.raises(ValueError, match="has an unknown part 'upscaler'"):
        registry.read_model(str(copy))
    change_json(copy / "wuerstchen_pl.json", format=2)
    with pytest.raises(ValueError, match="has format 2, but this release reads 1"):
        registry.read_model(str(copy))


def test_a_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a model"):
        registry.read_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        registry.read_model(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("wuerstchen/decoder", "kernel_size", 5, "kernel_size=5; only 3 is supported"),
        ("wuerstchen/decoder", "level_config", ["CT", "C", "CTA"], "level_config=.*only"),
        ("wuerstchen/vqgan", "in_channels", 4, "in_channels=4; only 3"),
        ("wuerstchen/text_encoder", "layer_norm_eps", 0.1, "layer_norm_eps=0.1; only"),
        ("wuerstchen/text_encoder", "hidden_act", "relu", "hidden_act='relu'; only gelu"),
        ("wuerstchen/vqgan", "_class_name", "AutoencoderKL", "_class_name='AutoencoderKL'; only"),
        ("wuerstchen/decoder", "nhead", None, "nhead=null"),
    ],
)
def test_unsupported_diffusers_configs_are_rejected(
    part: str, key: str, value: Any, message: str, model: Model, tmp_path: Path
) -> None:
    registry.write_model(model, tmp_path / "there", "diffusers")
    change_json(tmp_path / "there" / part / "config.json", **{key: value})
    with pytest.raises(ValueError, match=message):
        registry.read_model(str(tmp_path / "there"))


def test_another_noise_schedule_is_rejected(model: Model, tmp_path: Path) -> None:
    registry.write_model(model, tmp_path / "there", "diffusers")
    scheduler = tmp_path / "there" / "wuerstchen" / "scheduler" / "scheduler_config.json"
    change_json(scheduler, scaler=2.0)
    with pytest.raises(ValueError, match=r"scaler=2\.0; only 1\.0 is supported"):
        registry.read_model(str(tmp_path / "there"))


@pytest.mark.parametrize("format", ["diffusers", "upstream"])
def test_a_stage_b_without_text_can_only_be_written_natively(
    format: registry.FormatName, model: Model, tmp_path: Path
) -> None:
    decoder = model.parts["decoder"]
    part = type(decoder)({**decoder.config, "text_dim": None}, decoder.tensors)
    with pytest.raises(ValueError, match="no Stage B without text"):
        registry.write_model(Model({"decoder": part}), tmp_path / "there", format)
    assert not list(tmp_path.iterdir())
