"""Convert a model: ``python -m wuerstchen_pl.convert from=PATH to=PATH format=diffusers``."""

from collections.abc import Mapping
from typing import Any

from wuerstchen_pl.cli.command import Command
from wuerstchen_pl.formats import FormatName

KNOWN_KEYS: Mapping[str, Any] = {
    "from": str,
    "prior": str | None,
    "variant": str | None,
    "allow_mismatch": bool,
    "text_encoder": str | None,
    "prior_text_encoder": str | None,
    "lora": list[str],
    "to": str,
    "format": FormatName,
}

main = Command(name="convert", description=__doc__, known_keys=KNOWN_KEYS)

if __name__ == "__main__":
    main()
