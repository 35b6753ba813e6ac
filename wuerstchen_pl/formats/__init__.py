"""Model formats on disk (native, upstream, diffusers), read and written as a ``Model``."""

from typing import Literal

FormatName = Literal["native", "diffusers", "upstream"]
