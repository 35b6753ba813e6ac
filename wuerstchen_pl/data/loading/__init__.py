"""Loads batches of image tensors from sample names, in worker processes."""
