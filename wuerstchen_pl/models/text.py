"""CLIP text towers (open_clip) that give token states, not one pooled vector.

The published models were trained on the states that transformers' CLIPTextModel returns: captions
padded with the end token, padding masked as keys, the last layer after its norm, all positions.
open_clip pads with 0 and masks nothing; ``TextEncoder`` does what transformers does.
"""

import unicodedata
from collections.abc import Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

END_OF_TEXT = 49407
VOCABULARY = 49408


class TextEncoder(nn.Module):
    """Captions -> the states of every token.

    Args:
        width: D of the states (ViT-bigG-14: 1280, ViT-H-14: 1024).
        depth: transformer layers (bigG: 32, H: 24).
        num_heads: attention heads (bigG: 20, H: 16).
        context_length: L, tokens per caption with start and end.
        weights: an open_clip checkpoint of the whole CLIP model (``.safetensors``, ``.pt``,
            ``.bin``), of which the text tower is taken; None starts from random weights.

    Raises:
        FileNotFoundError: if ``weights`` is no file.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        context_length: int = 77,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.context_length = context_length
        self.weights = weights
        self.tokenizer = SimpleTokenizer(context_length=context_length)
        self.tower = TextTransformer(
            context_length=context_length,
            vocab_size=VOCABULARY,
            width=width,
            heads=num_heads,
            layers=depth,
            output_dim=None,
        )
        if weights is not None:
            self._load(weights)
        else:  # CLIP's 0.02 is for towers eight times as wide, and for more captions
            nn.init.normal_(self.tower.token_embedding.weight, std=width**-0.5)

    def _load(self, path: str) -> None:
        from open_clip.factory import load_state_dict

        state = load_state_dict(path, device="cpu", weights_only=True)
        own = self.tower.state_dict()
        state = {key.removeprefix("text."): value for key, value in state.items()}
        missing = sorted(own.keys() - state.keys())
        if missing:
            raise ValueError(f"text_encoder.weights={path} lacks {missing[0]}; it is no CLIP model")
        self.tower.load_state_dict({key: state[key] for key in own})

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, L) int64 ids, padded with the end token; too long ones are cut."""
        ids = self.tokenizer(list(captions))
        return torch.where(_after_end(ids), END_OF_TEXT, ids)

    def num_tokens(self, caption: str) -> int:
        """Tokens of a caption, start and end included, before any cut."""
        return len(self.tokenizer.encode(caption)) + 2

    def encode(self, ids: Tensor) -> Tensor:
        """(B, L) ids, padded with the end token -> (B, L, D) states after the last norm."""
        ids = ids.to(self.tower.token_embedding.weight.device)
        tower, length = self.tower, ids.shape[1]
        causal = tower.attn_mask[None, :length, :length]
        mask = causal.masked_fill(_after_end(ids)[:, None, :], float("-inf"))
        heads = tower.transformer.resblocks[0].attn.num_heads
        x = tower.token_embedding(ids) + tower.positional_embedding[:length]
        x = tower.transformer(x, attn_mask=mask.repeat_interleave(heads, dim=0))
        return tower.ln_final(x)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, L, D) states."""
        return self.encode(self.tokenize(captions))

    def check(self, prompt: str) -> None:
        """Refuse a prompt that the encoder cannot read whole, or at all.

        Raises:
            ValueError: if it holds no letter or digit, a control character, or too many tokens.
        """
        shown = repr(prompt if len(prompt) <= 40 else prompt[:40] + "...")
        if any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in prompt):
            raise ValueError(f"prompt={shown} holds a control character; remove it")
        if not any(c.isalnum() for c in prompt):
            raise ValueError(f"prompt={shown} holds no word; describe the picture in words")
        if (count := self.num_tokens(prompt)) > self.context_length:
            raise ValueError(
                f"prompt={shown} has {count} tokens with start and end, and the text encoder reads "
                f"{self.context_length}; shorten it"
            )


def _after_end(ids: Tensor) -> Tensor:
    """(B, L) true behind the first end token. Id 0 will not do: it is the token '!' as well."""
    is_end = ids == END_OF_TEXT
    return is_end.cumsum(dim=1) - is_end.long() > 0
