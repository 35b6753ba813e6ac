"""Evaluate a model, or images: ``python -m wuerstchen_pl.evaluate model=outputs/demo/c``.

Processes launched together, such as by torchrun, share the image generation.
"""

from collections.abc import Mapping
from typing import Any, Literal

from wuerstchen_pl.cli.command import Command

KNOWN_KEYS: Mapping[str, Any] = {
    "model": str | None,
    "prior": str | None,
    "variant": str | None,
    "allow_mismatch": bool,
    "images": str | None,
    "metric": list[str],
    "prompts": str,
    "num_prompts": int | None,
    "height": int | None,
    "width": int | None,
    "reference": str,
    "baselines": list[str],
    "fid_features": dict,
    "clip": dict,
    "pickscore": dict,
    "lpips": str | None,
    "seed": int,
    "sample": dict,
    "output_dir": str,
    "cache_dir": str | None,
    "device": str | None,
    "dtype": Literal["bfloat16", "float32"] | None,
    "compile": bool,
}

main = Command(name="evaluate", description=__doc__, known_keys=KNOWN_KEYS)

if __name__ == "__main__":
    main()
