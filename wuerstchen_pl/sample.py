"""Generate images from text: ``python -m wuerstchen_pl.sample prompt="a red heart"``."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from wuerstchen_pl.cli.command import Command

KNOWN_KEYS: Mapping[str, Any] = {
    "model": str,
    "prior": str | None,
    "variant": str | None,
    "allow_mismatch": bool,
    "lora": list[str],
    "words": list[str],
    "controlnet": str | None,
    "control_image": str | None,
    "control_scale": float,
    "prompt": Any,  # text, a number, or a list
    "prompts": str | None,
    "num_images_per_prompt": int,
    "seed": int,
    "height": int | None,
    "width": int | None,
    "output_dir": str,
    "grid": bool,
    "sample": dict,
    "device": str | None,
    "dtype": Literal["bfloat16", "float32"] | None,
    "compile": bool,
}


def quote_prompt(argument: str) -> str:
    """Quote the value of ``prompt=``, so that Hydra does not parse commas, braces, etc. in it.

    A value that Hydra parses as a list or as quoted text keeps its meaning.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, sign, text = argument.partition("=")
    if key != "prompt" or not sign:
        return argument
    try:
        value: Any = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        value = text
    if isinstance(value, list):
        return f"prompt=[{','.join(_quote(str(item)) for item in value)}]"
    return f"prompt={_quote(value if text[:1] in QUOTES else text)}"


QUOTES = ("'", '"')


def _quote(text: str) -> str:
    """Text as a quoted Hydra value without interpolations.

    Backslashes are doubled only before a quote, the end, or ``${``, where Hydra would unescape.
    """
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)
    text = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
    return f"'{text}'"


main = Command(name="sample", description=__doc__, known_keys=KNOWN_KEYS, rewrite=quote_prompt)

if __name__ == "__main__":
    main()
