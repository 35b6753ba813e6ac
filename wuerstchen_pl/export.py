"""Export a trained model: ``python -m wuerstchen_pl.export ckpt=outputs/demo/c to=model``."""

from collections.abc import Mapping
from typing import Any, Literal

from wuerstchen_pl.cli.command import Command
from wuerstchen_pl.formats import FormatName

KNOWN_KEYS: Mapping[str, Any] = {
    "ckpt": str,
    "to": str,
    "format": FormatName | Literal["adapter", "words", "controlnet"],
    "ema": bool,
    "push": str | None,
    "license": str | None,
}

main = Command(name="export", description=__doc__, known_keys=KNOWN_KEYS)

if __name__ == "__main__":
    main()
