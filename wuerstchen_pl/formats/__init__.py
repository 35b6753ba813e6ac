"""Model formats on disk (native, upstream, diffusers), read and written as a ``Model``."""
