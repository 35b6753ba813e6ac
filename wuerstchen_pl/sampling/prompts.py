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


def texts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several -> a list.

    Raises:
        ValueError: if there are none, or they are no text.
    """
    found = [prompt] if isinstance(prompt, str) else prompt
    is_list = isinstance(found, list | tuple) and len(found) > 0
    if not is_list or not all(isinstance(text, str) for text in found):
        raise ValueError(f"prompt={prompt!r} is no text; give a string or a list of them")
    return list(found)


def count(prompts: Prompts) -> int:
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
    found = len(prompts.states) if prompts.states is not None else len(texts(prompts.prompt or ""))
    if isinstance(prompts.negative, Sequence) and not isinstance(prompts.negative, str):
        negative = len(prompts.negative)
        if negative != found:
            raise ValueError(
                f"{negative} negative prompts for {found} prompts; give one for each, or one in all"
            )
    if prompts.states is not None and prompts.negative_states is not None:
        shapes = tuple(prompts.states.shape), tuple(prompts.negative_states.shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"prompt_embeds has shape {shapes[0]} and negative_prompt_embeds {shapes[1]}; "
                "give them the same shape"
            )
    return found


def encode(encoder: TextEncoder, prompts: Prompts, *, repeats: int, guided: bool) -> Tensor:
    """Prompts -> their states, each ``repeats`` times.

    Args:
        encoder: of this stage.
        prompts: N of them.
        repeats: pictures of each prompt.
        guided: append the states of the negative prompts, which are empty unless given.

    Returns:
        (N repeats, L, D), or (2 N repeats, L, D) if ``guided``.
    """
    number = count(prompts)
    states = prompts.states
    if states is None:
        states = read(encoder, texts(prompts.prompt or ""))
    both = [states]
    if guided:
        negative = prompts.negative_states
        if negative is None:
            given = texts(prompts.negative or "")
            negative = read(encoder, given * number if len(given) == 1 else given)
        both.append(negative.to(states))
    return torch.cat([part.repeat_interleave(repeats, dim=0) for part in both])


def read(encoder: TextEncoder, captions: list[str]) -> Tensor:
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
