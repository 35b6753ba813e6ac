"""Pairwise preference between images of the same prompt."""

from collections.abc import Sequence

from wuerstchen_pl.plural import plural


def pairwise_wins(scores: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """1 for each prompt whose score is above the baseline's, 0 where it is below, 1/2 for a tie.

    Raises:
        ValueError: if the numbers of scores differ.
    """
    if len(scores) != len(baseline):
        raise ValueError(
            f"{plural(len(scores), 'score')} and {plural(len(baseline), 'score')} do not match; "
            "use the same prompts for both"
        )
    return [0.5 if a == b else float(a > b) for a, b in zip(scores, baseline, strict=True)]
