"""Adapter files of this package, diffusers, kohya's scripts and OneTrainer."""

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPriorPipeline
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wuerstchen_pl.adapters.adapter import Adapter, Method
from wuerstchen_pl.adapters.low_rank import RankLimit, resize
from wuerstchen_pl.adapters.merged import MergedAdapters
from wuerstchen_pl.adapters.weights import AdapterWeights, LowRank
from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.adapter_files import FILE, METADATA, read_adapter, write_adapter
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import Model, Part, with_defaults
from wuerstchen_pl.models.prior import Prior

ARGUMENTS: dict[str, Any] = {"width": 128, "depth": 2, "num_heads": 2, "text_dim": 16}
CONFIG = {"_target_": "wuerstchen_pl.models.prior.Prior", **ARGUMENTS}
EVERY = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "kv_mapper.1",
    "channelwise.0",
    "channelwise.4",
    "mapper",
]


@pytest.fixture(scope="module")
def prior() -> Prior:
    torch.manual_seed(0)
    network = Prior(**ARGUMENTS).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        network.head.weight.mul_(0.1)
    return network


@pytest.fixture(scope="module")
def folder(prior: Prior, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prior in diffusers' format."""
    tensors = {name: in_memory(tensor) for name, tensor in prior.state_dict().items()}
    path = tmp_path_factory.mktemp("prior") / "model"
    registry.write_model(Model({"prior": Part(with_defaults(CONFIG), tensors)}), path, "diffusers")
    return path / "wuerstchen-prior/prior"


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, 16, 3, 4, generator=rng),
        torch.tensor([0.3, 0.8]),
        torch.randn(2, 7, 16, generator=rng),
    )


@torch.no_grad()
def output(network: Any, adapter: AdapterWeights | None = None) -> Tensor:
    if adapter is not None:
        network = copy.deepcopy(network)
        MergedAdapters(networks(network)).add("a", adapter, 1.0)
    return network(*inputs())


def networks(prior: Prior) -> nn.ModuleDict:
    return nn.ModuleDict({"prior": prior})


def read(path: Path, prior: Prior, alpha: float | None = None) -> AdapterWeights:
    return read_adapter(path, networks(prior), alpha=alpha)


def with_adapter_of_diffusers(folder: Path, *, alpha: int, dora: bool = False) -> Any:
    """Diffusers' prior with a random LoRA of rank 4 in every layer."""
    network: Any = WuerstchenPrior.from_pretrained(folder)
    torch.manual_seed(1)
    network.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=EVERY, use_dora=dora))
    for name, parameter in network.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return network.eval()


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) < 1e-4


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_diffusers_wrote_gives_its_output(
    dora: bool, prior: Prior, folder: Path, tmp_path: Path
) -> None:
    network = with_adapter_of_diffusers(folder, alpha=4, dora=dora)
    layers = get_peft_model_state_dict(network)
    WuerstchenPriorPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    (name,) = (path.name for path in tmp_path.iterdir())
    assert name == FILE
    expected = output(network)
    assert close(output(prior, read(tmp_path, prior)), expected)
    assert not close(output(prior), expected)


@pytest.mark.parametrize("alpha", [4, 9])
def test_alpha_is_that_of_the_header_or_of_the_call(
    alpha: int, prior: Prior, folder: Path, tmp_path: Path
) -> None:
    network = with_adapter_of_diffusers(folder, alpha=alpha)
    tensors = {f"prior.{k}": t for k, t in get_peft_model_state_dict(network).items()}
    stated = json.dumps({"prior.r": 4, "prior.lora_alpha": alpha})
    save_file(tensors, tmp_path / "stated.safetensors", {METADATA: stated})
    save_file(tensors, tmp_path / "silent.safetensors")
    expected = output(network)
    assert close(output(prior, read(tmp_path / "stated.safetensors", prior)), expected)
    silent = tmp_path / "silent.safetensors"
    assert close(output(prior, read(silent, prior, alpha=alpha)), expected)
    assert close(output(prior, read(silent, prior)), expected) == (alpha == 4)


def random_adapter(prior: Prior, method: Method) -> tuple[AdapterWeights, Tensor]:
    """A random adapter with alpha = 2 r, and the output of the network in training."""
    network = copy.deepcopy(prior)
    adapter = Adapter(method=method, rank=2, alpha=4.0, targets=["blocks.*"])
    adapter.add_to(network)
    torch.manual_seed(3)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    weights = adapter.weights(networks(network).state_dict())
    return weights, output(network.eval())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_diffusers_reads_what_was_written_here(
    method: Method, prior: Prior, folder: Path, tmp_path: Path
) -> None:
    weights, expected = random_adapter(prior, method)
    write_adapter(tmp_path / FILE, weights, networks(prior))
    network: Any = WuerstchenPrior.from_pretrained(folder)
    pipeline = WuerstchenPriorPipeline(
        tokenizer=None, text_encoder=None, prior=network, scheduler=None
    )
    pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    assert close(output(network), expected)


def test_ranks_may_differ_between_layers(prior: Prior, folder: Path, tmp_path: Path) -> None:
    weights, _ = random_adapter(prior, "lora")
    for layer in list(weights)[::3]:
        weights[layer] = resize(cast(LowRank, weights[layer]), RankLimit(1, None))
    expected = output(prior, weights)
    write_adapter(tmp_path / FILE, weights, networks(prior))
    assert close(output(prior, read(tmp_path, prior)), expected)
    network: Any = WuerstchenPrior.from_pretrained(folder)
    pipeline = WuerstchenPriorPipeline(
        tokenizer=None, text_encoder=None, prior=network, scheduler=None
    )
    pipeline.load_lora_weights(tmp_path, weight_name=FILE)
    assert close(output(network), expected)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_a_written_adapter_is_read_back(method: Method, prior: Prior, tmp_path: Path) -> None:
    weights, expected = random_adapter(prior, method)
    write_adapter(tmp_path / FILE, weights, networks(prior))
    assert close(output(prior, read(tmp_path, prior)), expected)
    with_header = load_file(tmp_path / FILE)
    save_file(with_header, tmp_path / "without.safetensors")
    assert close(output(prior, read(tmp_path / "without.safetensors", prior)), expected)


def renamed(tensors: dict[str, Tensor], layout: str, alpha: float) -> dict[str, Tensor]:
    """A diffusers file in the names of another trainer, with ``alpha`` where it stores one."""
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, kind = key.removeprefix("prior.").split(".lora_")
        which = {"A.weight": "down", "B.weight": "up"}[kind]
        if layout == "diffusers 2023":
            block, _, layer = name.rpartition("attention.")
            layer = layer.removesuffix(".0")
            result[f"prior.{block}attention.processor.{layer}_lora.{which}.weight"] = tensor
            continue
        prefix = "lora_unet_" if layout == "kohya" else "lora_prior_unet."
        layer = prefix + (name.replace(".", "_") if layout == "kohya" else name)
        result[f"{layer}.lora_{which}.weight"] = tensor
        result[f"{layer}.alpha"] = torch.tensor(alpha)
    return result


@pytest.mark.parametrize("layout", ["diffusers 2023", "kohya", "OneTrainer"])
def test_other_layouts_are_read(layout: str, prior: Prior, folder: Path, tmp_path: Path) -> None:
    network: Any = WuerstchenPrior.from_pretrained(folder)
    alpha = 4 if layout == "diffusers 2023" else 6
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    network.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    layers = {f"prior.{k}": t for k, t in get_peft_model_state_dict(network).items()}
    save_file(renamed(layers, layout, alpha), tmp_path / "lora.safetensors")
    adapter = read(tmp_path / "lora.safetensors", prior)
    assert close(output(prior, adapter), output(network.eval()))
    assert not close(output(prior), output(network))


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "another model": (
        {"prior.blocks.99.mapper.lora_A.weight": torch.zeros(1, 64)}, "is not of this model's",
    ),
    "another size": (
        {
            "prior.blocks.1.mapper.lora_A.weight": torch.ones(1, 3),
            "prior.blocks.1.mapper.lora_B.weight": torch.ones(256, 1),
        },
        r"is for a weight of \(256, 3\), but the network's has \(256, 64\)",
    ),
    "half a layer": (
        {"prior.blocks.1.mapper.lora_A.weight": torch.zeros(1, 64)}, "has the tensors lora_A",
    ),
    "no adapter": ({"weight": torch.zeros(1)}, "has weight, which is not a tensor of a known"),
    "nothing": ({}, "has no tensors of an adapter"),
    "text": (
        {"text_encoder.layers.0.lora_A.weight": torch.zeros(1)},
        "an adapter of Stage C's text encoder, which the model lacks",
    ),
    "not finite": ({"prior.blocks.1.mapper.lora_A.weight": torch.tensor([float("nan")])}, "finite"),
    "OneTrainer's DoRA": (
        {
            "lora_prior_unet.blocks.1.mapper.lora_down.weight": torch.zeros(1, 64),
            "lora_prior_unet.blocks.1.mapper.lora_up.weight": torch.zeros(256, 1),
            "lora_prior_unet.blocks.1.mapper.dora_scale": torch.zeros(1, 64),
        },
        "a magnitude per input, and only those per output",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_is_refused_by_name(case: str, prior: Prior, tmp_path: Path) -> None:
    tensors, message = BAD[case]
    save_file(tensors, tmp_path / "bad.safetensors")
    network = copy.deepcopy(prior)
    merged = MergedAdapters(networks(network))
    before = output(network)
    with pytest.raises(ValueError, match=message) as error:
        merged.add("bad", read(tmp_path / "bad.safetensors", prior), 1.0)
    assert case == "another size" or "bad.safetensors" in str(error.value)
    assert torch.equal(output(network), before)


def test_a_missing_or_damaged_file_is_named(prior: Prior, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lora=missing does not exist"):
        read(Path("missing"), prior)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"cut.safetensors is damaged"):
        read(tmp_path / "cut.safetensors", prior)


def test_weights_add_up_and_unloading_is_exact(prior: Prior) -> None:
    network = copy.deepcopy(prior)
    merged = MergedAdapters(networks(network))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first, expected = random_adapter(prior, "lora")
    second, _ = random_adapter(prior, "dora")
    merged.add("first", first, 0.0)
    assert torch.equal(output(network), output(prior))
    merged.set_weights({"first": 1.0})
    assert close(output(network), expected)
    merged.add("second", second, 0.5)
    merged.set_weights({"first": 0.0, "second": 0.0})
    assert torch.equal(output(network), output(prior))
    merged.set_weights({"first": 1.0})
    merged.clear(keep_merged=True)
    assert close(output(network), expected)
    network.load_state_dict(before)
    merged.add("first", first, 0.7)
    merged.clear()
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="no adapter 'third' is loaded; choose from none"):
        merged.set_weights({"third": 1.0})
