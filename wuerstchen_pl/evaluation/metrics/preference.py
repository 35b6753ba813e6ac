"""Which of two images of the same prompt is preferred, and how often."""

from collections.abc import Sequence


def pairwise_wins(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """For each prompt 1 if ours scores higher, 0 if theirs does, and 1/2 for a tie.

    Raises:
        ValueError: if there are not equally many.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} scores and {len(theirs)} are not of the same prompts")
    return [0.5 if a == b else float(a > b) for a, b in zip(ours, theirs, strict=True)]
