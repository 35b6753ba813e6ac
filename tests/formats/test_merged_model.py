"""``convert lora=``: the weights that a pipeline has after ``load_lora`` and ``fuse_lora``."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPriorPipeline
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from safetensors.torch import save_file
from torch import nn

from tests.formats.conftest import CONFIGS, assert_bit_equal, random_model, tensors
from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.adapters.adapter import Adapter
from wuerstchen_pl.checkpointing.allowed import instantiate_allowed
from wuerstchen_pl.formats import FormatName, registry
from wuerstchen_pl.formats.adapter_files import split_weight, write_adapter
from wuerstchen_pl.formats.model import Model

NETWORKS = ("prior", "decoder")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random adapters: ``both`` and ``dora`` of Stages C and B, ``prior`` of Stage C."""
    root = tmp_path_factory.mktemp("loras")
    for seed, (name, parts, method) in enumerate(
        [("both", NETWORKS, "lora"), ("dora", NETWORKS, "dora"), ("prior", ("prior",), "lora")]
    ):
        torch.manual_seed(seed)
        networks = nn.ModuleDict({part: instantiate_allowed(CONFIGS[part]) for part in parts})
        adapter = Adapter(method=method, rank=2, targets=["*.attention.*", "*.mapper"])  # type: ignore[arg-type]
        for network in networks.values():
            adapter.add_to(network)
        for parameter in networks.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.1
        weights = adapter.weights(networks.state_dict())
        write_adapter(root / f"{name}.safetensors", weights, networks)
    return root


@pytest.mark.parametrize("format", ["native", "diffusers", "upstream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merged_weights_are_those_of_a_pipeline(
    format: FormatName, dtype: torch.dtype, program: Callable[..., int], loras: Path, tmp_path: Path
) -> None:
    model = random_model(dtype)
    registry.write_model(model, tmp_path / "model", "native")
    source = tmp_path / "source"
    kept = {k: p for k, p in model.parts.items() if format != "upstream" or "text" not in k}
    registry.write_model(Model(kept, model.settings), source, format)
    adapters = [f"{loras / 'both.safetensors'}:0.5", f"{loras / 'dora.safetensors'}:-0.7"]
    keys = [f"from={source}", f"to={tmp_path / 'merged'}", f"lora=[{','.join(adapters)}]"]
    assert program("convert", *keys) == 0
    pipe = WuerstchenPipeline.from_pretrained(tmp_path / "model", torch_dtype=dtype)
    for text in adapters:
        path, weight = split_weight(text)
        pipe.load_lora(path, weight)
    pipe.fuse_lora()
    merged, before = tensors(registry.read_model(str(tmp_path / "merged"))), tensors(model)
    for part in NETWORKS:
        expected = pipe.components[part].state_dict()
        assert_bit_equal({name: merged.pop(f"{part}.{name}") for name in expected}, expected)
    assert_bit_equal(merged, {name: before[name] for name in merged})


def test_no_adapters_change_nothing(program: Callable[..., int], tmp_path: Path) -> None:
    model = random_model()
    registry.write_model(model, tmp_path / "model", "native")
    assert program("convert", f"from={tmp_path / 'model'}", f"to={tmp_path / 'same'}") == 0
    assert_bit_equal(tensors(registry.read_model(str(tmp_path / "same"))), tensors(model))


def test_the_model_card_names_what_was_merged(
    program: Callable[..., int], loras: Path, tmp_path: Path
) -> None:
    model = random_model()
    model.card = "# A card"
    registry.write_model(model, tmp_path / "model", "native")
    lora = loras / "prior.safetensors"
    keys = [f"from={tmp_path / 'model'}", f"to={tmp_path / 'merged'}", f"lora=[{lora}:0.5]"]
    assert program("convert", *keys) == 0
    card = (tmp_path / "merged/README.md").read_text()
    assert card == f"# A card\nAdapters were merged into it: {lora}:0.5.\n"


@torch.no_grad()
def test_diffusers_merges_the_same(
    program: Callable[..., int], loras: Path, tmp_path: Path
) -> None:
    model = random_model()
    model = Model({name: model.parts[name] for name in ("prior", "prior_text_encoder")})
    registry.write_model(model, tmp_path / "model", "diffusers")
    prior = "wuerstchen-prior/prior"
    network: Any = WuerstchenPrior.from_pretrained(tmp_path / "model" / prior)
    pipeline = WuerstchenPriorPipeline(
        tokenizer=None, text_encoder=None, prior=network, scheduler=None
    )
    pipeline.load_lora_weights(loras / "prior.safetensors")
    pipeline.fuse_lora(components=["prior"], lora_scale=0.5)
    expected = {k.replace(".base_layer.", "."): t for k, t in network.state_dict().items()}
    keys = [f"from={tmp_path / 'model'}", f"to={tmp_path / 'merged'}", "format=diffusers"]
    assert program("convert", *keys, f"lora=[{loras / 'prior.safetensors'}:0.5]") == 0
    merged = WuerstchenPrior.from_pretrained(tmp_path / "merged" / prior).state_dict()
    base = WuerstchenPrior.from_pretrained(tmp_path / "model" / prior).state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-5)
    assert sum(not torch.equal(base[name], merged[name]) for name in merged) == 10


WRONG = {
    "missing": ("lora=missing.safetensors does not exist; use a .safetensors file of an adapter"),
    "stage b": ("an adapter of Stage B, which the model lacks; use another model"),
    "text": ("has x.y.z, which is not a tensor of a known adapter; use another file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_adapter_is_one_sentence_and_nothing_is_written(
    case: str,
    program: Callable[..., int],
    loras: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    model = random_model()
    registry.write_model(Model({"prior": model.parts["prior"]}), tmp_path / "model", "native")
    save_file({"x.y.z": torch.zeros(1)}, tmp_path / "text.safetensors")
    path = {
        "missing": "missing.safetensors", "stage b": loras / "both.safetensors",
        "text": tmp_path / "text.safetensors",
    }[case]  # fmt: skip
    keys = [f"from={tmp_path / 'model'}", f"to={tmp_path / 'merged'}", f"lora=[{path}]"]
    assert program("convert", *keys) == 1
    assert re.search(re.escape(WRONG[case]), capsys.readouterr().err)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors:0.8", ("style.safetensors", 0.8)),
        ("style:-.5", ("style", -0.5)),
        ("me/style", ("me/style", 1.0)),
        ("c:style", ("c:style", 1.0)),
    ],
)
def test_a_weight_follows_the_path(text: str, expected: tuple[str, float]) -> None:
    assert split_weight(text) == expected
