"""The attention of a text tower as linear layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_pl.models.qkv import SplitQKV, shared_linear


class SplitAttention(nn.Module):
    """``nn.MultiheadAttention`` of tokens to themselves, each of whose layers can have an adapter.

    The module of torch reads its weights without calling its layers.

    Args:
        fused: with the batch first and biases; its weights are shared, not copied.
    """

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = fused.num_heads
        self.in_proj = SplitQKV(fused.in_proj_weight, fused.in_proj_bias)
        self.out_proj = shared_linear(fused.out_proj.weight, fused.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, need_weights: bool
    ) -> tuple[Tensor, None]:
        """(B, L, D) tokens and a (B heads, L, L) mask, which is added -> (B, L, D).

        The arguments are those of ``nn.MultiheadAttention``; only ``query`` is read as tokens.
        """
        heads = self.in_proj(query).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = heads
        mask = attn_mask.unflatten(0, (-1, self.num_heads)).to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None
