"""Captioned images, from their storage to batches: ``sources`` -> ``ordering`` -> ``loading``."""
