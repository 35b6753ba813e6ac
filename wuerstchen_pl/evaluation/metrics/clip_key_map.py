"""From transformers' names of a CLIPModel's tensors to open_clip's."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

TOWERS = {"text_model": "", "vision_model": "visual."}
OF_LAYER = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "logit_scale": "logit_scale",
}
TURNED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
"""Linear maps there, and matrices to multiply by here."""
LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under open_clip's names, with queries, keys and values in one.

    Raises:
        ValueError: for a name that no CLIPModel has.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):
            continue
        layer = LAYER.fullmatch(name)
        if name in OUTSIDE:
            found[OUTSIDE[name]] = tensor
        elif name in TURNED:
            found[TURNED[name]] = tensor.T.contiguous()
        elif layer is None:
            raise ValueError(f"{name} is not a tensor of a CLIPModel")
        elif layer[3].startswith("self_attn.") and layer[3] != "self_attn.out_proj":
            if layer[3] == "self_attn.q_proj":
                parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[f"{_block(layer)}.attn.in_proj_{layer[4]}"] = torch.cat(parts)
        elif layer[3] in OF_LAYER:
            found[f"{_block(layer)}.{OF_LAYER[layer[3]]}.{layer[4]}"] = tensor
        else:
            raise ValueError(f"{name} is not a tensor of a CLIPModel")
    return found


def _block(layer: re.Match[str]) -> str:
    return f"{TOWERS[layer[1]]}transformer.resblocks.{layer[2]}"
