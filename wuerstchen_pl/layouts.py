"""State dicts in the authors' published layout (dome272/Wuerstchen) -> ours.

Only names change, and a few tensors that we keep flat; no value does.
"""

import re
from collections.abc import Mapping

from torch import Tensor

State = dict[str, Tensor]

# Inside a denoiser's block: the published name -> ours.
_BLOCK = [
    (r"^depthwise\.", "res.depthwise."),
    (r"^channelwise\.0\.", "res.expand."),
    (r"^channelwise\.2\.", "res.response_norm."),
    (r"^channelwise\.4\.", "res.project."),
    (r"^mapper\.", "time.mapper."),
    (r"^attention\.attn\.in_proj_", "attn.attention.qkv."),
    (r"^attention\.attn\.out_proj\.", "attn.attention.out."),
    (r"^kv_mapper\.1\.", "attn.cond_mapper."),
]
_PRIOR = [
    (r"^projection\.", "stem."),
    (r"^cond_mapper\.0\.", "text_in."),
    (r"^cond_mapper\.2\.", "text_out."),
    (r"^out\.1\.", "head."),
]
_DIFFNEXT = [
    (r"^clip_mapper\.", "text_mapper."),
    (r"^embedding\.1\.", "stem."),
    (r"^clf\.1\.", "head."),
]
_VQGAN_BLOCK = [
    (r"depthwise\.1\.", "depthwise."),
    (r"channelwise\.0\.", "expand."),
    (r"channelwise\.2\.", "project."),
]


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, name in rules:
        key, found = re.subn(pattern, name, key)
        if found:
            break
    return key


def _flat(key: str, value: Tensor) -> Tensor:
    """Response norms are published as (1, 1, 1, C)."""
    return value.flatten() if key.endswith((".gamma", ".beta")) else value


def prior_from_original(state: Mapping[str, Tensor]) -> State:
    """Stage C's state dict (``model_v3_stage_c.pt``) -> ``models.prior.Prior``'s."""
    out: State = {}
    for key, value in state.items():
        if match := re.match(r"blocks\.(\d+)\.(.*)", key):
            name = f"blocks.{int(match[1]) // 3}.{_rename(match[2], _BLOCK)}"
        else:
            name = _rename(key, _PRIOR)
        out[name] = _flat(key, value)
    return out


def diffnext_from_original(state: Mapping[str, Tensor]) -> State:
    """Stage B's state dict (``model_v2_stage_b.pt``) -> ``models.diffnext.DiffNeXt``'s."""
    levels = 1 + max(int(m[1]) for k in state if (m := re.match(r"down_blocks\.(\d+)\.", k)))
    out: State = {}
    for key, value in state.items():
        if match := re.match(r"effnet_mappers\.(\d+)\.(.*)", key):
            side, i = ("down", "up")[int(match[1]) >= levels], int(match[1]) % levels
            name = f"{side}.{i}.semantic_mapper.{match[2]}"
        elif match := re.match(r"(down|up)_blocks\.(\d+)\.(\d+)\.(.*)", key):
            side, i, j, rest = match[1], int(match[2]), int(match[3]), match[4]
            name = _diffnext_block(state, side, i, j, rest)
        else:
            name = _rename(key, _DIFFNEXT)
        out[name] = _flat(key, value)
    return out


def _diffnext_block(state: Mapping[str, Tensor], side: str, i: int, j: int, rest: str) -> str:
    """The name of item ``j`` in level ``i``, where items are resamplers, or parts of blocks."""
    if re.fullmatch(r"1\.(weight|bias)", rest):
        return f"downsample.{i - 1}.{rest}" if side == "down" else f"upsample.{i}.{rest}"
    parts = 3 if any(re.match(rf"{side}_blocks\.{i}\.\d+\.kv_mapper", k) for k in state) else 2
    first = 1 if side == "down" and i > 0 else 0
    return f"{side}.{i}.blocks.{(j - first) // parts}.{_rename(rest, _BLOCK)}"


def vqgan_from_original(state: Mapping[str, Tensor], *, scale_factor: float = 0.3764) -> State:
    """Stage A's state dict (``vqgan_f4_v1_500k.pt``) -> ``models.vqgan.VQGAN``'s.

    Args:
        state: the published tensors.
        scale_factor: a constant of the published code, a buffer of ours.
    """
    down = 1 + max(int(m[1]) for k in state if (m := re.match(r"down_blocks\.(\d+)\.", k)))
    levels = down // 2  # a block per level, a resampler between two, the map to latents
    ups = [k for k in state if re.match(r"up_blocks\.\d+\.(weight|gammas)$", k)]
    names = _vqgan_decoder(ups, state, levels)
    out: State = {"scale_factor": next(iter(state.values())).new_tensor(scale_factor)}
    for key, value in state.items():
        if match := re.match(rf"down_blocks\.{down - 1}\.(\d)\.(.*)", key):
            name = f"{('to_latent', 'latent_norm')[int(match[1])]}.{match[2]}"
        elif match := re.match(r"down_blocks\.(\d+)\.(.*)", key):
            kind = ("block", "downsample")[int(match[1]) % 2]
            level = (int(match[1]) + 1) // 2
            name = f"encoder.{kind}{level}.{_rename(match[2], _VQGAN_BLOCK)}"
        elif match := re.match(r"up_blocks\.0\.0\.(.*)", key):
            name = f"from_latent.{match[1]}"
        elif match := re.match(r"up_blocks\.(\d+)\.(.*)", key):
            name = f"decoder.{names[int(match[1])]}.{_rename(match[2], _VQGAN_BLOCK)}"
        else:
            name = re.sub(r"^in_block\.1\.", "stem.", key)
            name = re.sub(r"^out_block\.0\.", "head.", name)
            name = re.sub(r"^vquantizer\.", "quantizer.", name)
        out[name] = value
    return out


def _vqgan_decoder(ups: list[str], state: Mapping[str, Tensor], levels: int) -> dict[int, str]:
    """Index in the published ``up_blocks`` -> our name: blocks, and a resampler after a level."""
    names, level, block = {}, levels - 1, 0
    for index in sorted(int(k.split(".")[1]) for k in ups):
        if f"up_blocks.{index}.gammas" in state:
            names[index] = f"block{level}_{block}"
            block += 1
        else:
            names[index] = f"upsample{level}"
            level, block = level - 1, 0
    return names


def discriminator_from_original(state: Mapping[str, Tensor]) -> State:
    """The critic's state dict, with torch's older spectral norm -> ours, with its newer one."""
    rules = [
        (r"\.weight_orig$", ".parametrizations.weight.original"),
        (r"\.weight_u$", ".parametrizations.weight.0._u"),
        (r"\.weight_v$", ".parametrizations.weight.0._v"),
        (r"^shuffle\.", "head."),
    ]
    return {_rename(key, rules): value for key, value in state.items()}
