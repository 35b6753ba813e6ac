"""Convert the state dict of a transformers CLIPModel to open_clip's names."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

TOWERS = {"text_model": "", "vision_model": "visual."}
LAYER_PARTS = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
TOP_LEVEL = {
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
TRANSPOSED = {
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}
"""Linear layers in transformers, stored as transposed matrices in open_clip."""
LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under open_clip's names, with query, key and value concatenated.

    Raises:
        ValueError: if a name is not a tensor of a CLIPModel.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):
            continue
        layer = LAYER.fullmatch(name)
        if name in TOP_LEVEL:
            converted[TOP_LEVEL[name]] = tensor
        elif name in TRANSPOSED:
            converted[TRANSPOSED[name]] = tensor.T.contiguous()
        elif layer is None:
            raise ValueError(f"{name} is not a tensor of a CLIPModel")
        elif layer[3].startswith("self_attn.") and layer[3] != "self_attn.out_proj":
            if layer[3] == "self_attn.q_proj":
                parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                converted[f"{_block(layer)}.attn.in_proj_{layer[4]}"] = torch.cat(parts)
        elif layer[3] in LAYER_PARTS:
            converted[f"{_block(layer)}.{LAYER_PARTS[layer[3]]}.{layer[4]}"] = tensor
        else:
            raise ValueError(f"{name} is not a tensor of a CLIPModel")
    return converted


def _block(layer: re.Match[str]) -> str:
    return f"{TOWERS[layer[1]]}transformer.resblocks.{layer[2]}"
