"""Image-text metrics: CLIP score and PickScore, both computed with open_clip."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.transform import image_transform
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wuerstchen_pl.evaluation.metrics.clip_key_map import from_transformers
from wuerstchen_pl.io import atomic
from wuerstchen_pl.models.tokenizer import Tokenizer


class Clip(nn.Module):
    """A CLIP model that compares images with texts.

    Args:
        net: the open_clip model.
        transform: preprocessing, from an image to the network's input.
        weights_sha256: sha256 of the weights file.
    """

    def __init__(
        self, net: nn.Module, *, transform: Callable[[Image.Image], Tensor], weights_sha256: str
    ) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.transform, self.weights_sha256 = transform, weights_sha256
        self.tokenizer = Tokenizer(context_length=self.net.context_length)  # type: ignore[arg-type]

    @torch.no_grad()
    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """N images and one text for each -> (N,) cosine similarities of their embeddings."""
        device = next(self.net.parameters()).device
        pixels = torch.stack([self.transform(image) for image in images]).to(device)
        distinct = list(dict.fromkeys(texts))
        ids, _ = self.tokenizer(distinct)
        encoded: Any = self.net.encode_text(ids.to(device))  # type: ignore[operator]
        image_embeds = F.normalize(self.net.encode_image(pixels), dim=-1)  # type: ignore[operator]
        text_embeds = F.normalize(encoded, dim=-1)[[distinct.index(text) for text in texts]]
        return (image_embeds * text_embeds).sum(dim=-1).float().cpu()

    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """(N,) CLIP scores, 100 max(cos, 0) (Hessel et al. 2021, arXiv 2104.08718)."""
        return 100 * self.cosines(images, texts).clamp(min=0)


class PickScore(Clip):
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP tuned on human preferences."""

    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """(N,) logit scale x cosine; a softmax over images of one text gives preferences."""
        scale = float(self.net.logit_scale.exp())  # type: ignore[operator]
        return scale * self.cosines(images, texts)


def clip(*, name: str, weights: str) -> Clip:
    """Load a CLIP model by open_clip.

    Args:
        name: open_clip's name of the architecture, such as ``ViT-L-14``.
        weights: an open_clip tag such as ``openai``, which is downloaded, or a local file. A local
            file of OpenAI's weights needs a name that ends in ``-quickgelu``.

    Raises:
        ValueError: if the model or the weights do not exist, or do not match.
        FileNotFoundError: if the weights cannot be downloaded.
    """
    if name not in open_clip.list_models():
        raise ValueError(f"name={name} is not an open_clip model; see open_clip.list_models()")
    config = dict(open_clip.get_model_config(name) or {})
    text = config.get("text_cfg", {})
    if config.get("custom_text") or {"hf_tokenizer_name", "hf_model_name"} & text.keys():
        raise ValueError(f"name={name} does not use CLIP's tokenizer; use a model such as ViT-L-14")
    local = Path(weights).is_file()
    if not local and weights not in open_clip.list_pretrained_tags_by_model(name):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(
            f"weights={weights} is neither a file nor a tag of {name}; use one of {tags}"
        )
    path = Path(weights) if local else _download(name, weights)
    pretrained = {} if local else open_clip.get_pretrained_cfg(name, weights)
    try:
        net, transform = open_clip.create_model_from_pretrained(
            name,
            pretrained=str(path),
            force_quick_gelu=bool(pretrained.get("quick_gelu")),  # not stored in the weights
            image_mean=pretrained.get("mean"),
            image_std=pretrained.get("std"),
            image_interpolation=pretrained.get("interpolation"),
            image_resize_mode=pretrained.get("resize_mode"),
            weights_only=True,
        )
    except Exception as error:  # torch's own message suggests weights_only=False
        raise ValueError(
            f"weights={weights} was not loaded: it is damaged, does not match {name}, or "
            "contains more than tensors; use other weights"
        ) from error
    return Clip(net, transform=transform, weights_sha256=atomic.sha256(path))


def _download(name: str, tag: str) -> Path:
    config = open_clip.get_pretrained_cfg(name, tag)
    try:
        return Path(open_clip.download_pretrained(config))
    except Exception as error:  # from urllib, requests or the hub client
        raise FileNotFoundError(
            f"weights={tag} of {name} cannot be downloaded ({type(error).__name__}); use a "
            "local file of the weights"
        ) from error


def pickscore(*, weights: str) -> PickScore:
    """Load PickScore from its published format, a transformers CLIPModel.

    Args:
        weights: a folder with ``config.json`` and ``model.safetensors``, or a hub repository id.

    Raises:
        FileNotFoundError: if a file is missing, or the repository cannot be downloaded.
        ValueError: if it is not a CLIPModel.
    """
    folder = Path(weights)
    if not folder.is_dir():
        try:
            patterns = ["config.json", "model.safetensors"]
            folder = Path(snapshot_download(weights, allow_patterns=patterns))
        except Exception as error:  # from requests or the hub client
            raise FileNotFoundError(
                f"weights={weights} is not a folder and cannot be downloaded "
                f"({type(error).__name__}); use a folder with config.json and model.safetensors"
            ) from error
    config, path = folder / "config.json", folder / "model.safetensors"
    for file in (config, path):
        if not file.is_file():
            raise FileNotFoundError(f"weights={weights} lacks {file.name}; add that file")
    try:
        clip_config = json.loads(config.read_text(encoding="utf-8"))
        net, side = _network(clip_config)
        net.load_state_dict(from_transformers(load_file(path)))
    except (
        ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError
    ) as error:  # fmt: skip
        raise ValueError(
            f"weights={weights} is not a transformers CLIPModel: {str(error).splitlines()[0]}"
        ) from error
    transform = image_transform(
        side, is_train=False, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD
    )
    return PickScore(net, transform=transform, weights_sha256=atomic.sha256(path))


def _network(config: dict[str, Any]) -> tuple[nn.Module, int]:
    """The open_clip network of a transformers config, and its input side in pixels."""
    text, vision = config["text_config"], config["vision_config"]
    activations = {text.get("hidden_act", "quick_gelu"), vision.get("hidden_act", "quick_gelu")}
    if len(activations) != 1 or not activations <= {"gelu", "quick_gelu"}:
        raise ValueError(f"hidden_act={sorted(activations)} is not supported by open_clip")
    net = open_clip.CLIP(
        embed_dim=config["projection_dim"],
        vision_cfg={
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "layers": vision["num_hidden_layers"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        },
        text_cfg={
            "context_length": text.get("max_position_embeddings", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        },
        quick_gelu=activations == {"quick_gelu"},
        init_logit_scale=math.log(1 / 0.07),
    )
    return net, int(vision["image_size"])
