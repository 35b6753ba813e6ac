"""CLIP score and PickScore equal those of a transformers CLIPModel with the same weights."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from wuerstchen_pl.evaluation.metrics.clip import Clip, clip, pickscore
from wuerstchen_pl.evaluation.metrics.clip_key_map import from_transformers
from wuerstchen_pl.models.tokenizer import Tokenizer

TEXTS = ["a red heart", "Two blue birds, on a branch!", "a red heart", "é à ñ 123"]


def image(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


IMAGES = [image(i, size) for i, size in enumerate([(64, 64), (90, 40), (33, 77), (64, 64)])]


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIPModel with random weights, saved by transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {"intermediate_size": 48, "num_attention_heads": 2, "hidden_act": request.param}
    text = {"hidden_size": 16, "num_hidden_layers": 2, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = {"hidden_size": 24, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(
        text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=12
    )
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    path = tmp_path_factory.mktemp("published")
    model.save_pretrained(path)
    return path


def reference_logits(folder: Path) -> torch.Tensor:
    """(4, 4) exp(logit scale) x cosines of the transformers model, images by texts."""
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    inputs = processor(size={"shortest_edge": 32}, crop_size=32)(IMAGES, return_tensors="pt")
    ids, _ = Tokenizer()(TEXTS)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits_per_image


def test_pickscore_equals_transformers(published: Path) -> None:
    scores = pickscore(weights=str(published)).scores(IMAGES, TEXTS)
    expected = reference_logits(published).diagonal()
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert float(scores.std()) > 0.1  # the scores are not constant


def test_clip_score_equals_transformers(published: Path) -> None:
    model = pickscore(weights=str(published))
    cosines = reference_logits(published).diagonal() / np.exp(3.0)
    plain = Clip(model.net, transform=model.transform, weights_sha256="")
    plain.net.visual.proj.data *= cosines.sign()[0]  # make the first cosine positive
    cosines = cosines * cosines.sign()[0]
    scores = plain.scores(IMAGES, TEXTS)
    torch.testing.assert_close(scores, 100 * cosines.clamp(min=0), rtol=1e-5, atol=1e-4)
    assert float(scores.std()) > 0.1


SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("quick", [True, False])
def test_a_tags_activation_and_preprocessing_are_used(
    quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not stored in the weights, so wrong ones would silently change the scores."""
    (tmp_path / "small-test.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(tmp_path / "small-test.json")
    torch.manual_seed(0)
    state = open_clip.CLIP(**{**SMALL, "quick_gelu": quick}).state_dict()  # type: ignore[arg-type]
    torch.save(state, tmp_path / "weights.pt")
    tag = {"url": "none", "quick_gelu": quick, "mean": (0.5,) * 3, "std": (0.5,) * 3,
           "interpolation": "bicubic", "resize_mode": "squash"}  # fmt: skip
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small-test", {"mine": tag})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda *_, **__: tmp_path / "weights.pt")
    model = clip(name="small-test", weights="mine")
    activations = {type(m).__name__ for m in model.modules() if "GELU" in type(m).__name__}
    assert activations == {"QuickGELU" if quick else "GELU"}
    white = model.transform(Image.new("RGB", (64, 32), "white"))
    assert torch.equal(white, torch.ones(3, 32, 32))  # (1 - 0.5) / 0.5


def test_damaged_or_malicious_weights_are_rejected(published: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="was not loaded: it is damaged, does not match"):
        clip(name="ViT-B-32", weights=str(tmp_path / "weights.pt"))
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="is not a transformers CLIPModel"):
        pickscore(weights=str(tmp_path))


def test_models_with_another_tokenizer_are_rejected() -> None:
    with pytest.raises(ValueError, match="does not use CLIP's tokenizer"):
        clip(name="ViT-B-16-SigLIP", weights="webli")


def test_a_folder_without_a_clip_model_is_rejected(published: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json"):
        pickscore(weights=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        pickscore(weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is not a transformers CLIPModel: 'text_config'"):
        pickscore(weights=str(tmp_path))
    config = json.loads((published / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not a transformers CLIPModel"):
        pickscore(weights=str(tmp_path))
    with pytest.raises(ValueError, match=r"lm_head\.weight is not a tensor of a CLIPModel"):
        from_transformers({"lm_head.weight": torch.zeros(1)})


def test_unknown_clip_models_and_weights_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name=ViT-X is not an open_clip model"):
        clip(name="ViT-X", weights="openai")
    with pytest.raises(
        ValueError, match=r"weights=none is neither a file nor a tag of ViT-B-32; use"
    ):
        clip(name="ViT-B-32", weights="none")
