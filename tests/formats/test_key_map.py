"""Names, shapes and arguments equal the external networks' at published sizes."""

import functools
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
import torchvision
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenPrior
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tests.formats.conftest import MODELS
from tests.models.test_paella import PUBLISHED
from tests.test_presets import part_config
from wuerstchen_pl.formats import config_map
from wuerstchen_pl.formats.key_map import ExternalFormat, key_mappings, to_external
from wuerstchen_pl.formats.lazy_tensors import in_memory
from wuerstchen_pl.formats.model import build_on_meta, with_defaults

Shapes = dict[str, tuple[int, ...]]


def shapes_of(tensors: Mapping[str, Any]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def external_shapes(config: dict[str, Any], format: ExternalFormat) -> Shapes:
    """External names and shapes of a native network."""
    state = build_on_meta(config).state_dict()
    state.pop("scale_factor", None)
    tensors = {name: in_memory(tensor) for name, tensor in state.items()}
    return shapes_of(to_external(tensors, key_mappings(config, tensors, format)))


def preset(stage: str, name: str, part: str) -> dict[str, Any]:
    return with_defaults(part_config(stage, name, part))


NETWORKS = [
    ("c", "v2", "prior", lambda: WuerstchenPrior(c=1536, depth=32, nhead=24, c_cond=1280)),
    ("c", "v1", "prior", lambda: WuerstchenPrior(c=1536, depth=32, nhead=24, c_cond=1024)),
    ("c", "paper", "prior", lambda: WuerstchenPrior(c=1280, depth=16, nhead=16, c_cond=1024)),
    ("b", "v2", "diffnext", WuerstchenDiffNeXt),
    ("a", "v2", "vqgan", PaellaVQModel),
]


@functools.cache
def on_meta(build: Callable[[], Any]) -> Any:
    """A network of diffusers without storage, and without its initialization, which takes 6 s."""
    with torch.device("meta"), mock.patch.object(nn.Module, "apply"):
        return build()


@pytest.mark.parametrize(("stage", "name", "part", "reference"), NETWORKS)
def test_names_and_shapes_equal_diffusers(stage: str, name: str, part: str, reference: Any) -> None:
    expected = shapes_of(on_meta(reference).state_dict())
    config = preset(stage, name, part)
    if name == "paper":  # its text encoder is configurable
        expected["cond_mapper.0.weight"] = (1280, config["text_dim"])
    assert external_shapes(config, "diffusers") == expected


@pytest.mark.parametrize(("stage", "name", "part", "reference"), NETWORKS)
def test_arguments_equal_diffusers(stage: str, name: str, part: str, reference: Any) -> None:
    expected = dict(on_meta(reference).config)
    config = preset(stage, name, part)
    if name == "paper":
        expected["c_cond"] = config["text_dim"]
    exported = config_map.to_diffusers(
        {**config, "scale_factor": 0.3764} if stage == "a" else config
    )
    assert {key: exported[key] for key in expected if key in exported} == {
        key: value for key, value in expected.items() if key in exported
    }
    assert expected.keys() - exported.keys() <= {"_use_default_values"}
    back = config_map.from_diffusers(config["_target_"], exported, "file")
    assert back == {key: {**config, "scale_factor": 0.3764}[key] for key in back}


@pytest.mark.parametrize(("stage", "name"), [("b", "v2"), ("c", "v2")])
def test_names_and_shapes_of_text_towers_equal_transformers(stage: str, name: str) -> None:
    config = with_defaults({**part_config(stage, name, "text_encoder"), "weights": None})
    config["vocab_size"] = 49408
    reference = CLIPTextConfig(**config_map.to_diffusers(config))
    with torch.device("meta"):
        expected = shapes_of(CLIPTextModel(reference).state_dict())
    actual, unprefixed = (
        # transformers 4 writes the prefix, 5 does not
        {key.removeprefix("text_model."): shape for key, shape in shapes.items()}
        for shapes in (external_shapes(config, "diffusers"), expected)
    )
    assert actual == unprefixed


class UpstreamCompressor(nn.Module):
    """Module names and shapes of the upstream EfficientNetEncoder."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.backbone = getattr(torchvision.models, f"efficientnet_v2_{size}")().features
        self.mapper = nn.Sequential(nn.Conv2d(1280, 16, 1, bias=False), nn.BatchNorm2d(16))


@pytest.mark.parametrize(("name", "size"), [("v2", "s"), ("v1", "l")])
def test_names_and_shapes_of_the_compressor_equal_upstream(name: str, size: str) -> None:
    backbone = {"_target_": MODELS + "compressor.EfficientNet", "size": size, "weights": None}
    config = with_defaults(
        {"_target_": MODELS + "compressor.SemanticCompressor", "backbone": backbone}
    )
    with torch.device("meta"):
        expected = shapes_of(UpstreamCompressor(size).state_dict())
    assert external_shapes(config, "upstream") == expected
    assert config_map.from_shapes("compressor", expected) == config


UPSTREAM = [
    ("prior", preset("c", "v2", "prior")),
    ("prior", preset("c", "v1", "prior")),
    ("decoder", preset("b", "v2", "diffnext")),
    ("decoder", with_defaults({"_target_": MODELS + "paella.Paella", **PUBLISHED})),
    ("vqgan", {**preset("a", "v2", "vqgan"), "scale_factor": 0.3764}),
]


@pytest.mark.parametrize(("part", "config"), UPSTREAM, ids=["c2", "c1", "b2", "b1", "a"])
def test_published_arguments_are_inferred_from_shapes(part: str, config: dict[str, Any]) -> None:
    inferred = config_map.from_shapes(part, external_shapes(config, "upstream"))
    assert inferred == {key: config[key] for key in inferred}
    # num_up_blocks=None: as many blocks up as down
    assert config.keys() - inferred.keys() <= {"dropout", "num_up_blocks"}
    assert config.get("num_up_blocks") is None


def test_shapes_of_another_network_are_rejected() -> None:
    with pytest.raises(ValueError, match="not the weights of a prior"):
        config_map.from_shapes("prior", {"conv.weight": (1, 2)})
