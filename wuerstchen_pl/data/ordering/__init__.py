"""The order of samples: shuffling, filters, buckets, ranks, and the position to resume from."""
