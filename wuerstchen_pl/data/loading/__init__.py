"""From the names of samples to tensors, in worker processes."""
