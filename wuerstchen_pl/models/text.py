"""CLIP text towers (open_clip) that return an embedding per token, not one pooled vector.

The published models were trained on the embeddings that transformers' CLIPTextModel returns:
captions padded with the end token, padding masked as keys, all positions of the last layer after
the final norm. open_clip pads with 0 and masks nothing; ``TextEncoder`` does the same as
transformers.

open_clip is imported when an encoder is built: it imports torchvision and transformers, which takes
as long as torch, and most programs that refer to an encoder build none.
"""

import unicodedata
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from wuerstchen_pl.io.contents import contents_of
from wuerstchen_pl.models.meta import is_building_on_meta
from wuerstchen_pl.models.pretrained import Pretrained
from wuerstchen_pl.models.tokenizer import Tokenizer
from wuerstchen_pl.models.words import Word, embed
from wuerstchen_pl.transfer import to_device


class TextEncoder(Pretrained):
    """Captions -> text embeddings, one per token.

    Args:
        width: D of the embeddings (ViT-bigG-14: 1280, ViT-H-14: 1024).
        depth: transformer layers (bigG: 32, H: 24).
        num_heads: attention heads (bigG: 20, H: 16).
        context_length: L, tokens per caption, including start and end.
        mlp_ratio: width of the MLPs' hidden layer, in units of ``width``.
        activation: ``gelu``, or ``quick_gelu`` as in OpenAI's towers.
        vocab_size: number of tokens; the tokenizer's if None.
        tokenizer: folder of a published tokenizer; None for open_clip's vocabulary.
        weights: an open_clip checkpoint of the whole CLIP model (``.safetensors``, ``.pt``,
            ``.bin``), of which only the text tower is loaded; None for random weights.

    Raises:
        FileNotFoundError: if ``weights`` is not a file.
        ValueError: if ``activation`` is unknown, or ``weights`` has no text tower.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        context_length: int = 77,
        mlp_ratio: float = 4.0,
        activation: Literal["gelu", "quick_gelu"] = "gelu",
        vocab_size: int | None = None,
        tokenizer: str | None = None,
        weights: str | None = None,
    ) -> None:
        from open_clip.transformer import QuickGELU, TextTransformer

        super().__init__()
        if activation not in ("gelu", "quick_gelu"):
            raise ValueError(f"activation={activation!r} is unknown; use gelu or quick_gelu")
        self.width = width
        self.num_heads = num_heads
        self.context_length = context_length
        self.weights = weights
        self.words: tuple[Word, ...] = ()
        self.tokenizer = Tokenizer(context_length=context_length, folder=tokenizer)
        self.tower = TextTransformer(
            context_length=context_length,
            vocab_size=vocab_size or self.tokenizer.size,
            width=width,
            heads=num_heads,
            layers=depth,
            mlp_ratio=mlp_ratio,
            act_layer=nn.GELU if activation == "gelu" else QuickGELU,
            output_dim=None,
            no_causal_mask=True,  # ``encode`` makes a causal mask that also masks padding
        )
        if weights is not None and not is_building_on_meta():
            self._load(weights)
        else:  # CLIP's std of 0.02 suits towers eight times as wide, trained on more captions
            nn.init.normal_(self.tower.token_embedding.weight, std=width**-0.5)

    @property
    def is_random(self) -> bool:
        """Whether the weights were read from no file."""
        return self.weights is None and self.source is None

    def _load(self, path: str) -> None:
        from open_clip.factory import load_state_dict

        with contents_of(path):
            state = load_state_dict(path, device="cpu", weights_only=True)
            expected = self.tower.state_dict()
            state = {key.removeprefix("text."): value for key, value in state.items()}
            missing = sorted(expected.keys() - state.keys())
            if missing:
                raise ValueError(f"weights={path} lacks {missing[0]}; give an open_clip checkpoint")
            self.tower.load_state_dict({key: state[key] for key in expected})

    def set_words(self, words: Sequence[Word]) -> None:
        """Read new words as their own vectors; earlier new words are removed.

        The vectors are not weights of the encoder: they are not in its state dict.

        Raises:
            ValueError: if vectors have another width than D, or see ``Tokenizer.set_words``; then
                nothing changes.
        """
        rows = self.tower.token_embedding.num_embeddings
        ids: list[tuple[str, range]] = []
        for word in words:
            number, width = word.vectors.shape
            if width != self.width:
                raise ValueError(
                    f"the vectors of {word.text!r} have a width of {width}, but the text encoder's "
                    f"is {self.width}; use a word of this text encoder"
                )
            ids.append((word.text, range(rows, rows := rows + number)))
        self.tokenizer.set_words(ids)
        self.words = tuple(words)

    def cut_off(self, caption: str) -> str:
        """The truncated end of a caption that is too long, or an empty string."""
        return self.tokenizer.decode(self.tokenizer.encode(caption)[self.context_length - 2 :])

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) ids and mask, false for padding -> (B, L, D) embeddings after the final norm."""
        tower, length = self.tower, ids.shape[1]
        device = tower.token_embedding.weight.device
        ids, mask = to_device(ids, device), to_device(mask, device)
        x = embed(ids, tower.token_embedding, self.words) + tower.positional_embedding[:length]
        masked = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
        masked = masked | ~mask[:, None, :]
        bias = torch.zeros(masked.shape, dtype=x.dtype, device=device)
        bias = bias.masked_fill(masked, float("-inf"))
        x = tower.transformer(x, attn_mask=bias.repeat_interleave(self.num_heads, dim=0))
        return tower.ln_final(x)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, L, D) embeddings."""
        return self.encode(*self.tokenizer(captions))

    def check(self, prompt: str) -> None:
        """Reject a prompt that the encoder cannot interpret; the empty one is of any image.

        Raises:
            ValueError: if it contains a control character, or no letter or digit.
        """
        shown = repr(prompt if len(prompt) <= 40 else prompt[:40] + "...")
        if any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in prompt):
            raise ValueError(f"prompt={shown} contains a control character; remove it")
        if prompt and not any(c.isalnum() for c in prompt):
            raise ValueError(f"prompt={shown} contains no word; describe the image in words")
