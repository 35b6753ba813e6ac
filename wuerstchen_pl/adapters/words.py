"""New words in training: their vectors learn, and all networks are frozen."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.models.words import Word, embed


class NewWords(nn.ModuleList):
    """New words of a text encoder (textual inversion, Gal et al. 2022, arXiv 2208.01618).

    Args:
        text: a word that captions contain, such as ``<rex>``, or a list of them.
        init: what the vectors of each word start from: a word or a phrase, or with ``*`` a pattern
            such as ``*dog*``, for the mean of all words of the vocabulary that match it. A phrase
            of ``num_vectors`` tokens gives a token to each vector, and another one its mean to all.
        num_vectors: n, the tokens that each word takes in a caption.

    Raises:
        ValueError: if an argument is out of range, or the numbers of words and of inits differ.
    """

    def __init__(
        self,
        *,
        text: str | Sequence[str],
        init: str | Sequence[str] = "*",
        num_vectors: int = 1,
    ) -> None:
        super().__init__()
        if num_vectors < 1:
            raise ValueError(f"num_vectors={num_vectors} is out of range; use 1 or more")
        self.texts = [text] if isinstance(text, str) else list(text)
        self.inits = [init] * len(self.texts) if isinstance(init, str) else list(init)
        if not self.texts or len(self.inits) != len(self.texts):
            raise ValueError(f"text={text} does not fit init={init}; each word needs its own")
        self.num_vectors = num_vectors

    def __iter__(self) -> Iterator[Word]:
        """The words, once they were added to a text encoder."""
        return cast(Iterator[Word], super().__iter__())

    def add_to(self, encoder: TextEncoder) -> None:
        """Add the words to a frozen text encoder, whose weights do not change.

        Raises:
            ValueError: if a word is a token already or appears twice, or ``init`` matches no token.
        """
        for text, init in zip(self.texts, self.inits, strict=True):
            self.append(Word(text, initial_vectors(encoder, init, self.num_vectors)))
        encoder.set_words([*encoder.words, *self])


@torch.no_grad()
def initial_vectors(encoder: TextEncoder, init: str, num_vectors: int) -> Tensor:
    """The (n, D) vectors that a word starts from; see ``NewWords``.

    Raises:
        ValueError: if no token matches.
    """
    is_pattern = "*" in init
    ids = encoder.tokenizer.matching(init) if is_pattern else encoder.tokenizer.encode(init)
    if not ids:
        raise ValueError(f"stage.words.init={init!r} has no token; use a word, such as dog")
    embedding = encoder.tower.token_embedding
    tokens = embed(torch.tensor(ids, device=embedding.weight.device), embedding, encoder.words)
    if len(ids) == num_vectors and not is_pattern:
        return tokens
    return tokens.mean(dim=0, keepdim=True).repeat(num_vectors, 1)
