"""Pairwise preference between images of the same prompt."""

from collections.abc import Sequence


def pairwise_wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 for each prompt where ours scores higher, 0 where theirs does, and 1/2 for a tie.

    Raises:
        ValueError: if the numbers of scores differ.
    """
    if len(ours) != len(theirs):
        raise ValueError(
            f"{len(ours)} and {len(theirs)} scores do not match; use the same prompts for both"
        )
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]
