"""Prompts, or their states, to what a denoiser reads."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wuerstchen_pl.models.text import TextEncoder


class Prompts(NamedTuple):
    """What to draw, and what to keep away from: texts or (N, L, D) states, each or neither."""

    prompt: str | Sequence[str] | None = None
    negative: str | Sequence[str] | None = None
    states: Tensor | None = None
    negative_states: Tensor | None = None


def check_num_images(number: int) -> int:
    """The number of images of each prompt.

    Raises:
        ValueError: if it is not a whole number from 1 on.
    """
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"num_images_per_prompt={number} draws nothing; use 1 or more")
    return number


def as_list(prompt: str | Sequence[str], name: str = "prompt") -> list[str]:
    """One prompt or several -> a list.

    Raises:
        ValueError: if there are none, or they are not text.
    """
    found = [prompt] if isinstance(prompt, str) else prompt
    is_list = isinstance(found, list | tuple) and len(found) > 0
    if not is_list or not all(isinstance(text, str) for text in found):
        raise ValueError(f"{name}={prompt!r} is not text; give a string or a list of them")
    return list(found)


def count_prompts(prompts: Prompts) -> int:
    """How many prompts there are.

    Raises:
        ValueError: if there is none, or one in two ways, or two numbers disagree.
    """
    for name, text, states in (
        ("prompt", prompts.prompt, prompts.states),
        ("negative_prompt", prompts.negative, prompts.negative_states),
    ):
        if text is not None and states is not None:
            raise ValueError(f"{name} and {name}_embeds are both given; give one of them")
    if prompts.prompt is None and prompts.states is None:
        raise ValueError("neither prompt nor prompt_embeds is given; give one of them")
    found = len(prompts.states) if prompts.states is not None else len(as_list(_given(prompts)))
    if prompts.negative is not None:
        negative = len(as_list(prompts.negative, "negative_prompt"))
        if negative not in (1, found):
            raise ValueError(
                f"{negative} negative prompts for {found} prompts; give one for each, or one in all"
            )
    return found


def _given(prompts: Prompts) -> str | Sequence[str]:
    return "" if prompts.prompt is None else prompts.prompt


def encode_prompts(encoder: TextEncoder, prompts: Prompts, *, repeats: int, guided: bool) -> Tensor:
    """Prompts -> their states, each ``repeats`` times.

    Args:
        encoder: of this stage.
        prompts: N of them.
        repeats: images of each prompt.
        guided: append the states of the negative prompts, which are empty unless given.

    Returns:
        (N repeats, L, D), or (2 N repeats, L, D) if ``guided``.
    """
    number, repeats = count_prompts(prompts), check_num_images(repeats)
    states = prompts.states
    if states is None:
        states = encode_texts(encoder, as_list(_given(prompts)))
    length = states.shape[1] if states.ndim > 1 else 0
    _check_states(states, (number, length, encoder.width), "prompt_embeds")
    both = [states]
    if guided:
        negative = prompts.negative_states
        if negative is None:
            given = as_list("" if prompts.negative is None else prompts.negative)
            negative = encode_texts(encoder, given * number if len(given) == 1 else given)
        _check_states(negative, tuple(states.shape), "negative_prompt_embeds")
        both.append(negative.to(states))
    return torch.cat([part.repeat_interleave(repeats, dim=0) for part in both])


def _check_states(states: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(states.shape) != shape:
        raise ValueError(f"{name} have shape {tuple(states.shape)}; give them {shape}")


def encode_texts(encoder: TextEncoder, captions: list[str]) -> Tensor:
    """Captions -> (N, L, D) states; says what of a caption is too long to be read."""
    for caption in dict.fromkeys(captions):
        if cut := encoder.cut_off(caption):
            warnings.warn(
                f"the text encoder reads {encoder.context_length} tokens; cut off: {cut!r}",
                stacklevel=2,
            )
    distinct = list(dict.fromkeys(captions))
    states = encoder(distinct)
    return states[[distinct.index(caption) for caption in captions]]
