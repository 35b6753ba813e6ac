"""Models on disk: ours, the authors' and diffusers' format, read and written as one ``Model``."""
