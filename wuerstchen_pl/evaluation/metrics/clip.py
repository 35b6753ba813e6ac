"""How well images fit their texts: CLIP score and PickScore, both by open_clip."""

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
        net: open_clip's.
        transform: an image -> what the network sees.
        weights_sha256: of its weights.
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
        """N images and the text of each -> (N,) cosines of their embeddings."""
        device = next(self.net.parameters()).device
        seen = torch.stack([self.transform(image) for image in images]).to(device)
        distinct = list(dict.fromkeys(texts))
        ids, _ = self.tokenizer(distinct)
        read: Any = self.net.encode_text(ids.to(device))  # type: ignore[operator]
        image_embeds = F.normalize(self.net.encode_image(seen), dim=-1)  # type: ignore[operator]
        text_embeds = F.normalize(read, dim=-1)[[distinct.index(text) for text in texts]]
        return (image_embeds * text_embeds).sum(dim=-1).float().cpu()

    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """(N,) CLIP scores, 100 max(cos, 0) (Hessel et al. 2021, arXiv 2104.08718)."""
        return 100 * self.cosines(images, texts).clamp(min=0)


class PickScore(Clip):
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): what people prefer, learned by a CLIP."""

    def scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """(N,) logit scale x cosine; softmax over the images of a text is their preference."""
        scale = float(self.net.logit_scale.exp())  # type: ignore[operator]
        return scale * self.cosines(images, texts)


def clip(*, name: str, weights: str) -> Clip:
    """One of open_clip's models.

    Args:
        name: of the architecture, such as ``ViT-L-14``.
        weights: a tag of open_clip's, such as ``openai``, which is downloaded, or a local file; of
            OpenAI's own training, that goes with a name on ``-quickgelu``.

    Raises:
        ValueError: if there is no such model, or no such weights.
        FileNotFoundError: if the weights cannot be had.
    """
    if name not in open_clip.list_models():
        raise ValueError(
            f"clip.name={name} is not a model of open_clip; see open_clip.list_models()"
        )
    config = dict(open_clip.get_model_config(name) or {})
    text = config.get("text_cfg", {})
    if config.get("custom_text") or {"hf_tokenizer_name", "hf_model_name"} & text.keys():
        raise ValueError(
            f"clip.name={name} reads other tokens than CLIP's; use one such as ViT-L-14"
        )
    local = Path(weights).is_file()
    if not local and weights not in open_clip.list_pretrained_tags_by_model(name):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise ValueError(f"clip.weights={weights} is not a file, and no tag of {name}; use {known}")
    path = Path(weights) if local else _tagged(name, weights)
    pretrained = {} if local else open_clip.get_pretrained_cfg(name, weights)
    try:
        net, transform = open_clip.create_model_from_pretrained(
            name,
            pretrained=str(path),
            force_quick_gelu=bool(pretrained.get("quick_gelu")),  # no tensor shows it
            image_mean=pretrained.get("mean"),
            image_std=pretrained.get("std"),
            image_interpolation=pretrained.get("interpolation"),
            image_resize_mode=pretrained.get("resize_mode"),
            weights_only=True,
        )
    except Exception as error:  # torch's own text advises to load it all the same
        raise ValueError(
            f"clip.weights={weights} are damaged, not those of {name}, or hold more than tensors; "
            "they are not loaded"
        ) from error
    return Clip(net, transform=transform, weights_sha256=atomic.sha256(path))


def _tagged(name: str, tag: str) -> Path:
    found = open_clip.get_pretrained_cfg(name, tag)
    try:
        return Path(open_clip.download_pretrained(found))
    except Exception as error:  # of urllib, requests or the hub's client
        raise FileNotFoundError(
            f"clip.weights={tag} of {name} cannot be downloaded ({type(error).__name__}); name a "
            "local file of them"
        ) from error


def pickscore(*, weights: str) -> PickScore:
    """PickScore from its published layout, transformers' of a CLIPModel.

    Args:
        weights: a folder with ``config.json`` and ``model.safetensors``, or an id of the hub.

    Raises:
        FileNotFoundError: if it cannot be had.
        ValueError: if it is not a CLIPModel.
    """
    folder = Path(weights)
    if not folder.is_dir():
        try:
            wanted = ["config.json", "model.safetensors"]
            folder = Path(snapshot_download(weights, allow_patterns=wanted))
        except Exception as error:  # of requests or the hub's client
            raise FileNotFoundError(
                f"pickscore.weights={weights} is not a folder, and cannot be downloaded "
                f"({type(error).__name__}); name a folder with config.json and model.safetensors"
            ) from error
    config, path = folder / "config.json", folder / "model.safetensors"
    for file in (config, path):
        if not file.is_file():
            raise FileNotFoundError(f"pickscore.weights={weights} lacks {file.name}")
    try:
        clip_config = json.loads(config.read_text(encoding="utf-8"))
        net, side = _network(clip_config)
        net.load_state_dict(from_transformers(load_file(path)))
    except (
        ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError
    ) as error:  # fmt: skip
        raise ValueError(
            f"pickscore.weights={weights} is not a CLIPModel of transformers: "
            f"{str(error).splitlines()[0]}"
        ) from error
    transform = image_transform(
        side, is_train=False, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD
    )
    return PickScore(net, transform=transform, weights_sha256=atomic.sha256(path))


def _network(config: dict[str, Any]) -> tuple[nn.Module, int]:
    """open_clip's network, and its side in pixels, of transformers' config."""
    text, vision = config["text_config"], config["vision_config"]
    quick = {text.get("hidden_act", "quick_gelu"), vision.get("hidden_act", "quick_gelu")}
    if len(quick) != 1 or not quick <= {"gelu", "quick_gelu"}:
        raise ValueError(f"hidden_act={sorted(quick)} is none that open_clip has")
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
        quick_gelu=quick == {"quick_gelu"},
        init_logit_scale=math.log(1 / 0.07),
    )
    return net, int(vision["image_size"])
