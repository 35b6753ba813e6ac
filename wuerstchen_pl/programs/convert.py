"""Convert a model between formats."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from wuerstchen_pl.formats import FormatName, clip, registry
from wuerstchen_pl.formats.hub import resolve_source
from wuerstchen_pl.formats.merged_model import merge_adapters
from wuerstchen_pl.formats.model import Model
from wuerstchen_pl.io.output_folder import claimed


def run(cfg: DictConfig) -> None:
    """Read a model in any format and write it in another."""
    with claimed(Path(cfg.to), key="to", must_be_empty=True):
        model = registry.read_model(
            cfg["from"],
            prior=cfg.prior,
            variant=cfg.variant,
            allow_mismatch=cfg.allow_mismatch,
        )
        for name in ("text_encoder", "prior_text_encoder"):
            if cfg[name] is not None:
                model.parts[name] = clip.read_text_encoder(resolve_source(cfg[name]))
        write(merge_adapters(model, cfg.lora), Path(cfg.to), cfg.format)


def write(model: Model, path: Path, format: FormatName) -> None:
    """Write a model and print its parts; warn about parts that the format cannot store."""
    if format == "upstream":
        omitted = [name for name in model.parts if name.endswith("text_encoder")]
        if omitted:
            warnings.warn(
                f"format=upstream cannot store {' and '.join(omitted)}: left out", stacklevel=2
            )
        model = replace(model, parts={k: v for k, v in model.parts.items() if k not in omitted})
    for name, part in model.parts.items():
        for word in getattr(part.network, "words", ()):
            warnings.warn(
                f"format={format} cannot store the word {word.text!r} of the {name}: left out; "
                "export format=words writes it",
                stacklevel=2,
            )
    registry.write_model(model, path, format)
    for name, part in model.parts.items():
        types = {str(t.dtype).removeprefix("torch.") for t in part.tensors.values()}
        count = sum(math.prod(t.shape) for t in part.tensors.values())
        print(f"{name:20s} {count:15,d} numbers, {', '.join(sorted(types))}")
    print(path)
