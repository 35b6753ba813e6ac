"""Network sizes of the shipped configs against the paper and the releases, on the meta device."""

from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from open_clip.model import CLIPTextCfg, _build_text_tower

from wuerstchen_pl.cli.config import conf_dir
from wuerstchen_pl.models.meta import on_meta
from wuerstchen_pl.sampling.prior import PriorSampler
from wuerstchen_pl.stages.ema import EMA

COUNTS = [
    ("a", "v2", "vqgan", 18_406_894),
    ("a", "v1", "vqgan", 18_406_894),
    ("b", "v2", "diffnext", 1_055_365_280),
    ("c", "paper", "prior", 347_037_472),
    ("c", "v1", "prior", 993_243_680),
    ("c", "v2", "prior", 993_636_896),
    ("ldm", "paper", "prior", 894_654_752),  # computed: the paper gives only widths and depths
]


def part_config(stage: str, preset: str, part: str) -> dict[str, Any]:
    """The constructor arguments of a network in a preset."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("train", [f"stage={stage}", f"preset={preset}"])
    return OmegaConf.to_container(cfg.stage[part])  # type: ignore[return-value]


@pytest.mark.parametrize(("stage", "preset", "part", "count"), COUNTS)
def test_a_preset_has_the_published_number_of_parameters(
    stage: str, preset: str, part: str, count: int
) -> None:
    with on_meta():
        net = instantiate(part_config(stage, preset, part), _convert_="all")
    assert sum(p.numel() for p in net.parameters()) == count


def test_the_compressor_has_the_published_latent_sizes() -> None:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("train", ["stage=b", "preset=v2", "stage.compressor.backbone.weights=null"])
    with on_meta():
        compressor = instantiate(cfg.stage.compressor, _convert_="all")
        semantic = compressor(torch.empty(1, 3, 1024, 1024))
    assert compressor.latent_size(1024, 1024) == tuple(semantic.shape[-2:]) == (24, 24)
    assert compressor.latent_size(1024, 1536) == (24, 36)  # ceil(px / 42.67)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", pytest.param("v2", marks=pytest.mark.slow), "tiny"])
def test_the_third_phase_of_stage_c_has_the_papers_positions(preset: str) -> None:
    """Appendix E.3: the compressor's input is 768 x 768, 768 x 1280 or 1280 x 768 px."""
    keys = ["experiment=paper_c_3", f"preset={preset}", "data.urls=x"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        sizes = instantiate(compose("train", keys).data, _convert_="all").sizes
        node = compose("train", ["stage=b", f"preset={preset}"]).stage.compressor
    if preset != "tiny":
        node.backbone.weights = None
    with on_meta():
        compressor = instantiate(node, _convert_="all")
        shapes = [compressor(torch.empty(1, 3, *size)).shape[-2:] for size in sizes]
    assert [tuple(shape) for shape in shapes] == [(24, 24), (24, 40), (40, 24)]
    if preset != "tiny":
        assert [compressor.resized(*s) for s in sizes] == [(768, 768), (768, 1280), (1280, 768)]
    sampler: Any = SimpleNamespace(resolution_multiple=compressor.resolution_multiple)
    assert [PriorSampler.latent_size(sampler, *size) for size in sizes] == shapes


@pytest.mark.parametrize(("preset", "model"), [("v1", "ViT-H-14"), ("v2", "ViT-bigG-14")])
def test_the_text_encoders_match_clip(preset: str, model: str) -> None:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("train", ["stage=c", f"preset={preset}", "stage.text_encoder.weights=null"])
    clip = open_clip.get_model_config(model)
    with on_meta():
        actual = instantiate(cfg.stage.text_encoder).tower
        expected = _build_text_tower(clip["embed_dim"], CLIPTextCfg(**clip["text_cfg"]))
    shapes = {name: p.shape for name, p in expected.named_parameters() if name != "text_projection"}
    assert {name: p.shape for name, p in actual.named_parameters()} == shapes
    heads = [t.transformer.resblocks[0].attn.num_heads for t in (actual, expected)]
    assert heads[0] == heads[1]


@pytest.mark.parametrize("preset", ["v1", "v2"])
def test_the_published_priors_average_as_the_released_code(preset: str) -> None:
    """0.9 every 100 steps: after 5,000 steps the first copy, then the recursion by hand."""
    ema: EMA = instantiate(part_config("c", preset, "ema"))
    module = torch.nn.Linear(1, 1, bias=False)
    shadows = {}
    for step in range(1, 5401):
        torch.nn.init.constant_(module.weight, step)
        ema.update(module)
        if ema.shadow:
            shadows[step] = float(ema.shadow["weight"])
    first = min(shadows)
    assert first == 5100
    assert shadows[5199] == 5100
    assert shadows[5200] == pytest.approx(0.9 * 5100 + 0.1 * 5200)
    assert shadows[5400] == pytest.approx(0.9 * (0.9 * shadows[5200] + 0.1 * 5300) + 0.1 * 5400)
