"""Captioned images, from wherever they are to batches: `sources` -> `order` -> `loading`."""
