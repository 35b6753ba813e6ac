"""Textual inversion: a stage learns the vectors of new words, and its networks do not change."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from wuerstchen_pl.adapters.words import NewWords

if TYPE_CHECKING:
    from wuerstchen_pl.stages.stage import Stage


def learn_words(stage: "Stage", words: NewWords, denoiser: str) -> None:
    """Add words to the text encoder of a stage; freeze its denoiser, unless that has an adapter.

    The denoiser stays a submodule, as gradients pass through it, so that it is computed in the
    trainer's precision, sharded, and recomputed like one that is trained. A checkpoint names it by
    path and hash, and lacks its tensors.

    Args:
        stage: with its networks.
        words: new ones.
        denoiser: its attribute.

    Raises:
        ValueError: if there is no text encoder, or it is trained, or the weights of the denoiser
            are of no model; see also ``NewWords.add_to``.
    """
    network, encoder = getattr(stage, denoiser), cast(Any, stage).text_encoder
    if getattr(network, "source", None) is None:
        raise ValueError("words need the weights of a base model; set preset=base and init_from")
    if encoder is None:
        raise ValueError("words need a text encoder, and this Stage B reads no text; use stage=c")
    if "text_encoder" not in stage.frozen:
        raise ValueError("words need a frozen text encoder; set train_text_encoder=false")
    words.add_to(encoder)
    stage.words = words
    if denoiser not in stage.adapters:
        network.requires_grad_(False)
        _leave_out(stage, f"{denoiser}.")


def _leave_out(stage: nn.Module, prefix: str) -> None:
    """Save and load the state of a stage without the tensors whose names have a prefix."""

    def drop(module: nn.Module, state: dict[str, Any], _: str, metadata: Mapping[str, Any]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]

    def ignore(module: nn.Module, incompatible_keys: Any) -> None:
        missing = incompatible_keys.missing_keys
        missing[:] = [key for key in missing if not key.startswith(prefix)]

    stage.register_state_dict_post_hook(drop)
    stage.register_load_state_dict_post_hook(ignore)
