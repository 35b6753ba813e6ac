"""Models on disk: ours, the authors' and diffusers' layout, read and written as one ``Model``."""
