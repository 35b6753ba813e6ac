"""Discrete diffusion of tokens, as in version 1's Stage B: corruption, loss and sampling.

Paella (Rampas et al. 2022, arXiv 2211.07292): tokens are replaced by random ones, and a network
classifies the original ones. Published in dome272/Wuerstchen (MIT), ``train_stage_B.py`` and
``modules.py``.

Dimensions: B batch, K codebook entries, H and W height and width.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from wuerstchen_pl.diffusion.schedule import expand_like

LABEL_SMOOTHING = 0.1
KEPT_WEIGHT = 0.7
"""By how much the weight of a token that was not replaced is below 1, at time 0."""
Classifier = Callable[[Tensor, int], Tensor]
"""Tokens (B, H, W) and the number of a step -> logits (B, K, H, W) of the clean tokens."""
ChoiceName = Literal["multinomial", "argmax", "expected"]


def sample_token_times(uniform: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) -> training times in [0.001, 1]; more than 7 % of them are 1."""
    return (1.08 * (1 - uniform) + 0.001).clamp(0.001, 1)


def replace_tokens(tokens: Tensor, replacements: Tensor, uniform: Tensor, t: Tensor) -> Tensor:
    """Replace each token with probability t.

    Args:
        tokens: (B, H, W).
        replacements: (B, H, W), random tokens.
        uniform: (B, H, W) in [0, 1).
        t: (B,).
    """
    return torch.where(is_replaced(uniform, t), replacements, tokens)


def is_replaced(uniform: Tensor, t: Tensor) -> Tensor:
    """(B, H, W) uniform numbers and (B,) times -> where tokens are replaced."""
    return uniform <= expand_like(t, uniform)


def token_weights(replaced: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weights of the tokens in the loss, whose sum is 1 in each sample, or 0 if all are masked.

    A token that was not replaced, and is easy to predict at small t, has less weight.

    Args:
        replaced: (B, H, W), see ``is_replaced``.
        t: (B,).
        mask: (B, 1, H', W') in [0, 1], at the size of the images; see ``objective.noise_error``.
    """
    weights = 1 - KEPT_WEIGHT * (1 - replaced.float()) * (1 - expand_like(t, replaced))
    if mask is not None:
        weights = weights * F.interpolate(mask.float(), weights.shape[-2:], mode="area")[:, 0]
    return weights / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1e-6)


def token_error(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy with label smoothing of each sample, (B,).

    Args:
        logits: (B, K, H, W).
        tokens: (B, H, W), the clean ones.
        weights: (B, H, W), see ``token_weights``.
    """
    errors = F.cross_entropy(
        logits.float(), tokens, reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    return (errors * weights).sum(dim=(1, 2))


# Sampling


def random_tokens(uniform: Tensor, codebook_size: int) -> Tensor:
    """Uniform numbers in [0, 1) -> tokens that are equally likely."""
    return (uniform * codebook_size).long()


def draw_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw tokens by the inverse of their cumulative probabilities.

    Unlike ``torch.multinomial`` it needs one random number per token, so that numbers of a CPU's
    generators give the same tokens on every device.

    Args:
        logits: (B, K, H, W).
        temperature: above 0; logits are divided by it.
        uniform: (B, H, W) in [0, 1).
    """
    cumulative = (logits.float() / temperature).softmax(dim=1).cumsum(dim=1)
    thresholds = uniform[:, None] * cumulative[:, -1:]  # the last one is 1 only up to rounding
    return (cumulative <= thresholds).sum(dim=1).clamp(max=logits.shape[1] - 1)


def choose_tokens(
    logits: Tensor,
    choice: ChoiceName,
    temperature: float,
    uniform: Callable[[], Tensor],
    nearest: Callable[[Tensor], Tensor],
) -> Tensor:
    """Tokens (B, H, W) for their logits.

    Args:
        logits: (B, K, H, W).
        choice: ``multinomial`` draws them, ``argmax`` takes the likeliest, and ``expected`` the one
            whose code is nearest to the expected code.
        temperature: above 0; logits are divided by it.
        uniform: returns (B, H, W) random numbers in [0, 1); only called to draw tokens.
        nearest: (B, K, H, W) probabilities -> the tokens nearest to the expected codes.

    Raises:
        ValueError: if ``choice`` is unknown.
    """
    if choice == "multinomial":
        return draw_tokens(logits, temperature, uniform())
    if choice == "argmax":
        return logits.argmax(dim=1)
    if choice == "expected":
        return nearest((logits.float() / temperature).softmax(dim=1))
    raise ValueError(f"choice={choice!r} is unknown; choose from {', '.join(get_args(ChoiceName))}")


@torch.no_grad()
def sample_tokens(
    classify: Classifier,
    tokens: Tensor,
    times: Sequence[float],
    choose: Callable[[Tensor, int], Tensor],
    uniform: Callable[[], Tensor],
    *,
    renoise_steps: int | None = None,
    on_step: Callable[[int, Tensor], Tensor] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Sample tokens along ``times``: choose all of them, and replace a share by the initial ones.

    Args:
        classify: the classifier, guided or not.
        tokens: (B, H, W), random; what replaced tokens become again in every step.
        times: decreasing, from 1 to 0; the share of tokens that are replaced after each step.
        choose: logits and the number of a step -> tokens; see ``choose_tokens``.
        uniform: returns (B, H, W) random numbers in [0, 1) that decide what is replaced.
        renoise_steps: the steps after which tokens are replaced; None is all but the last.
        on_step: called after step i with i and the tokens at ``times[i + 1]``; returns those for
            the next step.
        interrupted: called after each step; True stops the loop.

    Returns:
        (B, H, W).
    """
    initial, num_steps = tokens, len(times) - 1
    renoise_steps = num_steps - 1 if renoise_steps is None else renoise_steps
    for i, (_, t_next) in enumerate(itertools.pairwise(times)):
        tokens = choose(classify(tokens, i), i)
        if i < renoise_steps:
            t = torch.full((len(tokens),), t_next, device=tokens.device)
            tokens = replace_tokens(tokens, initial, uniform(), t)
        if on_step is not None:
            tokens = on_step(i, tokens)
        if interrupted():
            break
    return tokens
