"""Read a separate CLIP text encoder, which upstream weights do not include."""

from pathlib import Path
from typing import Any

from torch import Tensor

from wuerstchen_pl.formats import diffusers
from wuerstchen_pl.formats.config_map import HEAD_WIDTH
from wuerstchen_pl.formats.lazy_tensors import LazyTensor, in_memory, read_pickle, read_safetensors
from wuerstchen_pl.formats.model import TEXT_ENCODER, Part, check_tensors, with_defaults


def read_text_encoder(path: Path) -> Part:
    """Read a transformers folder of a CLIPTextModel, or an open_clip file of a CLIP.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if it is neither.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; use a CLIP text encoder")
    if path.is_dir():
        return diffusers.read_text_encoder(path, path.with_name("tokenizer"))
    return _read_open_clip(path)


def _read_open_clip(path: Path) -> Part:
    """The text tower of a CLIP checkpoint; its tokenizer is open_clip's default one."""
    checkpoint = (
        read_safetensors(path)
        if path.suffix == ".safetensors"
        else {
            name: in_memory(tensor)
            for name, tensor in _state_dict(read_pickle(path)).items()
            if isinstance(tensor, Tensor)  # not the epoch, for example
        }
    )
    tensors = {name.removeprefix("text."): lazy for name, lazy in checkpoint.items()}
    prefixes = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.")
    tower = {f"tower.{name}": lazy for name, lazy in tensors.items() if name.startswith(prefixes)}
    if "tower.token_embedding.weight" not in tower:
        raise ValueError(f"{path} has no CLIP text tower; use an open_clip checkpoint")
    part = Part(_config(tower), tower)
    check_tensors(part, str(path))
    return part


def _state_dict(content: dict[str, Any]) -> dict[str, Any]:
    return content.get("state_dict", content)


def _config(tower: dict[str, LazyTensor]) -> dict[str, Any]:
    vocabulary, width = tower["tower.token_embedding.weight"].shape
    first = "tower.transformer.resblocks.0.mlp.c_fc.weight"
    return with_defaults(
        {
            "_target_": TEXT_ENCODER,
            "width": width,
            "depth": sum(name.endswith(".ln_1.weight") for name in tower),
            "num_heads": width // HEAD_WIDTH,
            "context_length": tower["tower.positional_embedding"].shape[0],
            "vocab_size": vocabulary,
            "mlp_ratio": tower[first].shape[0] / width,
        }
    )
