"""Whether a data module fits a stage."""

from collections.abc import Mapping
from typing import Any

import lightning as L

from wuerstchen_pl.models.fingerprint import encoder_fingerprints
from wuerstchen_pl.stages.stage import Stage


def check_sizes(stage: Stage, data: L.LightningDataModule) -> None:
    """Refuse image sizes that are not multiples of the stage's ``size_multiple``.

    Raises:
        ValueError: naming the first such size.
    """
    for height, width in data.sizes:  # type: ignore[attr-defined]
        if height % stage.size_multiple or width % stage.size_multiple:
            raise ValueError(
                f"a bucket of {height} x {width} px is not a multiple of {stage.size_multiple}, as "
                f"stage={stage.name} needs; set data.bucket_multiple={stage.size_multiple} or "
                "a multiple of that"
            )


def check_mask(stage: Stage, data: L.LightningDataModule) -> None:
    """Refuse masks for Stage A, whose losses are of whole images.

    Raises:
        ValueError: naming the key.
    """
    if stage.name == "a" and (mask := getattr(data, "mask", None)) is not None:
        raise ValueError(
            f"data.mask={mask!r} has no effect on stage=a, whose losses are of whole images; set "
            "data.mask=null"
        )


def check_control(stage: Stage, data: L.LightningDataModule, *, cache: bool) -> None:
    """Refuse data without the control images that a ControlNet is trained with.

    Args:
        stage: any stage.
        data: its data.
        cache: whether they are going to be cached.

    Raises:
        ValueError: naming the key.
    """
    controlnet = getattr(stage, "controlnet", None)
    reads_files = controlnet is not None and controlnet.control_images.from_files
    if controlnet is not None and (cache or hasattr(data, "made_with")):
        raise ValueError(
            "a ControlNet reads the images, which a cache of Stage C does not have; set "
            "cache=false, and data to images, such as data=folder"
        )
    if reads_files and not getattr(data, "control", False):
        raise ValueError("control images from files are read with data.control=true; set it")
    if getattr(data, "control", False) and not reads_files:
        raise ValueError(
            "data.control=true has no effect without a ControlNet that reads files; set "
            "experiment=controlnet and control_images=file, or data.control=false"
        )


def check_cache(stage: Stage, data: L.LightningDataModule) -> None:
    """Refuse a cache that was made with other frozen networks than this stage's.

    Raises:
        ValueError: naming the network that differs.
    """
    made_with: dict[str, str] | None = getattr(data, "made_with", None)
    if made_with is None:
        return
    if "text_encoder" in made_with and stage.words is not None:
        raise ValueError(
            "data.root is a cache with text embeddings, which words that are trained would not "
            "change; make it with text=false"
        )
    current = {"stage": stage.name}
    frozen: Mapping[str, Any] = stage.frozen  # of types that depend on the stage
    encoder = frozen.get("stage_b" if stage.name == "c" else "stage_a")
    if encoder is not None:
        text = frozen.get("text_encoder") if "text_encoder" in made_with else None
        current = encoder_fingerprints(stage.name, encoder=encoder, text_encoder=text)
    for name, value in made_with.items():
        if current.get(name) != value:
            raise ValueError(
                f"data.root is a cache made with {name} {value[:12]}, but this run has "
                f"{current.get(name, 'none')[:12]}; make it again with python -m "
                f"wuerstchen_pl.cache, or use the {name} that it was made with"
            )


def check_words(stage: Stage, data: L.LightningDataModule) -> None:
    """Refuse new words that no caption of the training images has.

    Raises:
        ValueError: naming the first such word.
    """
    captions = [
        data.captions.plain(caption)  # type: ignore[attr-defined]
        for sample in data.splits.first_window["train"]  # type: ignore[attr-defined]
        for caption in sample.captions
    ]
    for word in stage.words or ():
        if not any(stage.text_encoder.tokenizer.has_word(word.text, c) for c in captions):
            raise ValueError(
                f"no caption has the word {word.text!r} of stage.words.text, so that nothing could "
                f"be learned; add it to the captions, or set data.captions.trigger={word.text!r}"
            )


def describe_sizes(stage: Stage, data: L.LightningDataModule) -> str:
    """The bucket sizes, each with its number of semantic positions."""
    parts = []
    for height, width in data.sizes:  # type: ignore[attr-defined]
        positions = stage.semantic_size(height, width)
        semantic = "" if positions is None else f" ({positions[0]} x {positions[1]})"
        parts.append(f"{height} x {width}{semantic}")
    unit = "px" if stage.semantic_size(1, 1) is None else "px (and semantic positions)"
    return f"buckets, height x width in {unit}: {', '.join(parts)}"
