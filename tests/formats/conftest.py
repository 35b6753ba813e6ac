"""A small random cascade as a model, with every kind of part."""

from pathlib import Path
from typing import Any

import pytest
import torch

from wuerstchen_pl.formats import registry
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import Model, Part, build_on_meta, with_defaults

MODELS = "wuerstchen_pl.models."
CONFIGS: dict[str, dict[str, Any]] = {
    "prior_text_encoder": {
        "_target_": MODELS + "text.TextEncoder", "width": 16, "depth": 2, "num_heads": 2,
        "context_length": 77, "vocab_size": 49408, "mlp_ratio": 3.0,
    },
    "prior": {
        "_target_": MODELS + "prior.Prior", "width": 128, "depth": 2, "num_heads": 2,
        "text_dim": 16, "time_dim": 8,
    },
    "text_encoder": {
        "_target_": MODELS + "text.TextEncoder", "width": 12, "depth": 1, "num_heads": 2,
        "context_length": 77, "vocab_size": 49408, "activation": "quick_gelu",
    },
    "decoder": {
        "_target_": MODELS + "diffnext.DiffNeXt", "widths": [16, 64, 128],
        "num_blocks": [1, 2, 1], "num_heads": [None, 1, 2],
        "inject_semantic": [False, True, True], "cond_dim": 8, "text_dim": 12, "time_dim": 8,
    },
    "vqgan": {
        "_target_": MODELS + "vqgan.VQGAN", "levels": 2, "bottleneck_blocks": 2, "width": 16,
        "codebook_size": 8, "scale_factor": 0.3764,
    },
    "compressor": {
        "_target_": MODELS + "compressor.SemanticCompressor",
        "backbone": {"_target_": MODELS + "compressor.ConvBackbone", "width": 4, "depth": 3},
    },
}  # fmt: skip
SETTINGS = {
    "image_size": 768.0,
    "semantic_scale": 42.0, "semantic_shift": 1.0, "resolution_multiple": 42.67,
    "latent_dim_scale": 10.67,
}  # fmt: skip


def random_part(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Part:
    """A part with random weights; integer tensors are ranges."""
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in build_on_meta(config).state_dict().items():
        if name == "scale_factor":
            tensors[name] = torch.tensor(config["scale_factor"])
        elif tensor.is_floating_point():
            tensors[name] = torch.randn(tensor.shape, generator=rng).to(dtype)
        else:
            tensors[name] = torch.arange(tensor.numel()).reshape(tensor.shape)
    return Part(
        with_defaults(config), {name: in_memory(tensor) for name, tensor in tensors.items()}
    )


def random_model(dtype: torch.dtype = torch.float32) -> Model:
    parts = {name: random_part(config, dtype) for name, config in CONFIGS.items()}
    return Model(parts, dict(SETTINGS))


def tensors(model: Model) -> dict[str, torch.Tensor]:
    """All tensors of a model, by part and name."""
    return {
        f"{part}.{name}": lazy.load()
        for part in model.parts
        for name, lazy in model.parts[part].tensors.items()
    }


def assert_bit_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.fixture(scope="session")
def model() -> Model:
    return random_model()


@pytest.fixture(scope="session")
def native_folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in the native format."""
    path = tmp_path_factory.mktemp("format") / "native"
    registry.write_model(model, path, "native")
    return path
