"""Interpolate two models: ``python -m wuerstchen_pl.interpolate a=A b=B to=C weight=0.5``.

out = (1 - w) a + w b, tensor by tensor. The published Stage C is the mean of its weights after the
third and the fourth phase of training (paper, appendix E).
"""

from collections.abc import Mapping
from typing import Any

from wuerstchen_pl.cli.command import Command
from wuerstchen_pl.formats import FormatName

KNOWN_KEYS: Mapping[str, Any] = {
    "a": str,
    "b": str,
    "variant": str | None,
    "to": str,
    "weight": float,
    "format": FormatName,
}

main = Command(name="interpolate", description=__doc__, known_keys=KNOWN_KEYS)

if __name__ == "__main__":
    main()
