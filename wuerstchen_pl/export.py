"""Export a trained model: ``python -m wuerstchen_pl.export ckpt=outputs/demo/c to=model``."""

from collections.abc import Mapping
from typing import Any

from wuerstchen_pl.cli import command
from wuerstchen_pl.formats import FormatName

KNOWN_KEYS: Mapping[str, Any] = {
    "ckpt": str,
    "to": str,
    "format": FormatName,
    "ema": bool,
    "license": str | None,
}

main = command("export", __doc__, KNOWN_KEYS)

if __name__ == "__main__":
    main()
