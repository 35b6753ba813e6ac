"""Convert a model: ``python -m wuerstchen_pl.convert from=PATH to=PATH format=diffusers``."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from wuerstchen_pl.cli import command
from wuerstchen_pl.config import check_config
from wuerstchen_pl.formats import clip, registry
from wuerstchen_pl.formats.model import Model
from wuerstchen_pl.formats.registry import FormatName
from wuerstchen_pl.io.output_folder import claimed

KNOWN_KEYS: Mapping[str, Any] = {
    "from": str,
    "prior": str | None,
    "variant": str | None,
    "text_encoder": str | None,
    "prior_text_encoder": str | None,
    "to": str,
    "format": FormatName,
}


def run(cfg: DictConfig) -> None:
    """Read a model in any format and write it in another."""
    check_config(cfg, KNOWN_KEYS)
    with claimed(Path(cfg.to), key="to", must_be_empty=True):
        model = registry.read_model(cfg["from"], prior=cfg.prior, variant=cfg.variant)
        for name in ("text_encoder", "prior_text_encoder"):
            if cfg[name] is not None:
                model.parts[name] = clip.read_text_encoder(registry.resolve_source(cfg[name]))
        write(model, Path(cfg.to), cfg.format)


def write(model: Model, path: Path, format: FormatName) -> None:
    """Write a model and print its parts; warn about parts that the format cannot store."""
    if format == "upstream":
        omitted = [name for name in model.parts if name.endswith("text_encoder")]
        if omitted:
            warnings.warn(
                f"format=upstream cannot store {' and '.join(omitted)}: left out", stacklevel=2
            )
        model = replace(model, parts={k: v for k, v in model.parts.items() if k not in omitted})
    registry.write_model(model, path, format)
    for name, part in model.parts.items():
        types = {str(t.dtype).removeprefix("torch.") for t in part.tensors.values()}
        count = sum(math.prod(t.shape) for t in part.tensors.values())
        print(f"{name:20s} {count:15,d} numbers, {', '.join(sorted(types))}")
    print(path)


main = command("convert", run)

if __name__ == "__main__":
    main()
