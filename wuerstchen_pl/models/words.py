"""New words of a text encoder, by vectors of their own (textual inversion, arXiv 2208.01618)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Word(nn.Module):
    """A word that a text encoder reads as n tokens, with its own vectors as their embeddings.

    Args:
        text: the word.
        vectors: (n, D), in the order of the tokens.

    Raises:
        ValueError: if ``vectors`` has another shape.
    """

    def __init__(self, text: str, vectors: Tensor) -> None:
        super().__init__()
        if vectors.ndim != 2 or not len(vectors):
            raise ValueError(
                f"the vectors of {text!r} have the shape {tuple(vectors.shape)}; use one of "
                "(number, width)"
            )
        self.text = text
        self.vectors = nn.Parameter(vectors.detach().float().clone())


def embed(ids: Tensor, embedding: nn.Embedding, words: Sequence[Word]) -> Tensor:
    """Token ids -> embeddings, with those of new words after the rows of an embedding.

    Args:
        ids: (..., L); those after the rows of the embedding are of the words, in their order.
        embedding: of the vocabulary.
        words: of the embedding's width.

    Returns:
        (..., L, D); the gradient of ``words`` is 0, not None, if no id is of a word.
    """
    if not words:
        return embedding(ids)
    rows = embedding.num_embeddings
    vectors = torch.cat([word.vectors for word in words]).to(embedding.weight)
    new = F.embedding((ids - rows).clamp(min=0), vectors)
    return torch.where((ids >= rows)[..., None], new, embedding(ids.clamp(max=rows - 1)))
