"""Adapters of a pipeline's networks against those that peft adds to diffusers' networks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts import reference_models
from wuerstchen_pl import WuerstchenPipeline
from wuerstchen_pl.formats.adapter_files import FILE

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "kv_mapper.1"]
NETWORKS = {
    "prior": ("prior_prior", [*ATTENTION, "mapper", "channelwise.0", "channelwise.4"]),
    "decoder": ("decoder", [*ATTENTION, "mapper", "channelwise.4", "clip_mapper"]),
}
"""Prefix in a file -> diffusers' network, and the layers with an adapter."""
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


@pytest.fixture
def reference(tmp_path: Path) -> Any:
    return reference_models.combined(tmp_path / "tokenizer")


@pytest.fixture
def pipe(reference: Any, tmp_path: Path) -> WuerstchenPipeline:
    """The same networks as in ``reference``."""
    decoder, prior = reference_models.save_pair(reference, tmp_path)
    return WuerstchenPipeline.from_pretrained(decoder, prior=prior)


def add_adapter(network: nn.Module, targets: list[str]) -> dict[str, Tensor]:
    """Add a random LoRA with peft, and return its tensors."""
    torch.manual_seed(7)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=3, target_modules=targets), network)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    return get_peft_model_state_dict(network)


@torch.no_grad()
def text_outputs(pipe: Any, reference: Any) -> tuple[Tensor, Tensor]:
    encoder = pipe.prior.text_encoder
    ids, mask = encoder.tokenizer(["a red heart", "frog"])
    expected = reference.prior_text_encoder(ids, attention_mask=mask.long()).last_hidden_state
    return encoder.encode(ids, mask), expected


@torch.no_grad()
def outputs(pipe: Any, reference: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The output of each network, here and in diffusers."""
    rng = torch.Generator().manual_seed(5)
    t = torch.tensor([0.3, 0.8])
    semantic = torch.randn(2, 16, 3, 4, generator=rng)
    latents = torch.randn(2, 4, 16, 24, generator=rng)
    text_c, text_b = (torch.randn(2, 7, width, generator=rng) for width in (24, 20))
    return {
        "prior": (
            pipe.prior.prior(semantic, t, text_c), reference.prior_prior(semantic, t, text_c),
        ),
        "decoder": (
            pipe.decoder.decoder(latents, t, semantic, text_b),
            reference.decoder(latents, t, semantic, text_b),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("prefixes", [["prior"], ["decoder"], ["prior", "decoder"]])
def test_a_file_changes_the_networks_that_it_names_as_peft_does(
    prefixes: list[str], pipe: WuerstchenPipeline, reference: Any, tmp_path: Path
) -> None:
    before = outputs(pipe, reference)
    tensors = {}
    for prefix in prefixes:
        name, targets = NETWORKS[prefix]
        added = add_adapter(getattr(reference, name), targets)
        tensors |= {f"{prefix}.{key}": tensor for key, tensor in added.items()}
    save_file(tensors, tmp_path / FILE)
    pipe.load_lora(tmp_path / FILE)
    for name, (actual, expected) in outputs(pipe, reference).items():
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
        is_changed = float((actual - before[name][0]).abs().max()) > 0.01
        assert is_changed == (name in prefixes)
    pipe.unload_lora()
    after = outputs(pipe, reference)
    assert all(torch.equal(after[name][0], before[name][0]) for name in before)


def text_key(key: str, layout: str) -> str:
    """The name of a tensor in a file, from that in transformers 5."""
    name, kind = key.split(".lora_")
    which = {"A.weight": "down.weight", "B.weight": "up.weight"}[kind]
    if layout == "kohya":
        return f"lora_te_text_model_{name.replace('.', '_')}.lora_{which}"
    if layout == "OneTrainer":
        return f"lora_prior_te.text_model.{name}.lora_{which}"
    return f"text_encoder.{'text_model.' * (layout == 'diffusers')}{key}"


@pytest.mark.parametrize(
    "layout",
    [
        "diffusers", "kohya",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("transformers 5", "OneTrainer")),
    ],
)  # fmt: skip
def test_text_encoders_have_the_adapters_of_all_layouts(
    layout: str, pipe: WuerstchenPipeline, reference: Any, tmp_path: Path
) -> None:
    before = text_outputs(pipe, reference)[0]
    added = add_adapter(reference.prior_text_encoder, TEXT)
    assert len(added) == 2 * 6 * 2  # matrices, layers of a block, blocks
    save_file({text_key(key, layout): t for key, t in added.items()}, tmp_path / FILE)
    pipe.load_lora(tmp_path / FILE)
    actual, expected = text_outputs(pipe, reference)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert float((actual - before).abs().max()) > 0.01
    pipe.unload_lora()
    assert torch.equal(text_outputs(pipe, reference)[0], before)
