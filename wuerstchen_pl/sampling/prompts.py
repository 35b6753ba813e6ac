"""Prompts, or their text embeddings -> the text conditioning of a denoiser."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wuerstchen_pl.models.text import TextEncoder
from wuerstchen_pl.plural import plural


class Prompts(NamedTuple):
    """Prompts and negative prompts, each as texts, as (N, L, D) embeddings, or absent."""

    prompt: str | Sequence[str] | None = None
    negative: str | Sequence[str] | None = None
    embeds: Tensor | None = None
    negative_embeds: Tensor | None = None


def check_num_images(num_images: int) -> int:
    """The number of images per prompt, checked.

    Raises:
        ValueError: if it is not a positive integer.
    """
    if not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f"num_images_per_prompt={num_images} is out of range; use 1 or more")
    return num_images


def as_list(prompt: str | Sequence[str], name: str = "prompt") -> list[str]:
    """One prompt or several -> a list.

    Raises:
        ValueError: if there are none, or one is not text.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    is_list = isinstance(texts, list | tuple) and len(texts) > 0
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={prompt!r} is not text; give a string or a list of them")
    return list(texts)


def count_prompts(prompts: Prompts) -> int:
    """Number of prompts.

    Raises:
        ValueError: if there is none, one is given as text and embeddings, or the numbers differ.
    """
    for name, text, embeds in (
        ("prompt", prompts.prompt, prompts.embeds),
        ("negative_prompt", prompts.negative, prompts.negative_embeds),
    ):
        if text is not None and embeds is not None:
            raise ValueError(f"{name} and {name}_embeds are both given; use one of them")
    if prompts.prompt is None and prompts.embeds is None:
        raise ValueError("neither prompt nor prompt_embeds is given; give one of them")
    if prompts.embeds is not None:
        num_prompts = len(prompts.embeds)
    else:
        num_prompts = len(as_list(_texts(prompts)))
    if prompts.negative is not None:
        negative = len(as_list(prompts.negative, "negative_prompt"))
        if negative not in (1, num_prompts):
            raise ValueError(
                f"{plural(negative, 'negative prompt')} for {plural(num_prompts, 'prompt')}; give "
                "one per prompt, or one for all"
            )
    return num_prompts


def _texts(prompts: Prompts) -> str | Sequence[str]:
    return "" if prompts.prompt is None else prompts.prompt


def encode_prompts(encoder: TextEncoder, prompts: Prompts, *, repeats: int, guided: bool) -> Tensor:
    """Prompts -> their text embeddings, each ``repeats`` times.

    Args:
        encoder: text encoder of this stage.
        prompts: N prompts.
        repeats: images per prompt.
        guided: append those of the negative prompts, which default to empty ones.

    Returns:
        (N repeats, L, D), or (2 N repeats, L, D) if ``guided``.

    Raises:
        ValueError: for a prompt without words; see ``TextEncoder.check``.
    """
    num_prompts, repeats = count_prompts(prompts), check_num_images(repeats)
    embeds = prompts.embeds
    if embeds is None:
        texts = as_list(_texts(prompts))
        for text in texts:
            encoder.check(text)
        embeds = encode_texts(encoder, texts)
    length = embeds.shape[1] if embeds.ndim > 1 else 0
    _check_embeds(embeds, (num_prompts, length, encoder.width), "prompt_embeds")
    both = [embeds]
    if guided:
        negative = prompts.negative_embeds
        if negative is None:
            texts = as_list("" if prompts.negative is None else prompts.negative)
            negative = encode_texts(encoder, texts * num_prompts if len(texts) == 1 else texts)
        _check_embeds(negative, tuple(embeds.shape), "negative_prompt_embeds")
        both.append(negative.to(embeds))
    return torch.cat([part.repeat_interleave(repeats, dim=0) for part in both])


def _check_embeds(embeds: Tensor, shape: tuple[int, ...], name: str) -> None:
    if tuple(embeds.shape) != shape:
        raise ValueError(f"{name} have shape {tuple(embeds.shape)}; use shape {shape}")


def encode_texts(encoder: TextEncoder, captions: list[str]) -> Tensor:
    """Captions -> (N, L, D) embeddings; warns if a caption is truncated."""
    for caption in dict.fromkeys(captions):
        if cut := encoder.cut_off(caption):
            warnings.warn(
                f"the text encoder reads {encoder.context_length} tokens; truncated: {cut!r}",
                stacklevel=2,
            )
    distinct = list(dict.fromkeys(captions))
    embeds = encoder(distinct)
    return embeds[[distinct.index(caption) for caption in captions]]
