"""Caches of the outputs of frozen networks: written once, then read instead of images."""
