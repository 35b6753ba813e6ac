"""Textual inversion: a stage learns the vectors of new words, and its networks do not change."""

from typing import TYPE_CHECKING, Any, cast

from wuerstchen_pl.adapters.words import NewWords
from wuerstchen_pl.stages.frozen_base import freeze_base

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage


def learn_words(stage: "Stage", words: NewWords, denoiser: str) -> None:
    """Add words to the text encoder of a stage; freeze its denoiser, unless that has an adapter.

    Args:
        stage: with its networks.
        words: new ones.
        denoiser: its attribute.

    Raises:
        ValueError: if there is no text encoder, or it is trained, or the weights of the denoiser
            are of no model; see also ``NewWords.add_to``.
    """
    encoder = cast(Any, stage).text_encoder
    if encoder is None:
        raise ValueError("words need a text encoder, and this Stage B reads no text; use stage=c")
    if "text_encoder" not in stage.frozen:
        raise ValueError(
            "words need a frozen text encoder; set train_text_encoder=false and text_adapter=null"
        )
    words.add_to(encoder)
    stage.words = words
    if denoiser not in stage.adapters:
        freeze_base(stage, denoiser)
