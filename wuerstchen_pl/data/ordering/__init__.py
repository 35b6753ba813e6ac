"""Which sample comes when: shuffling, filters, buckets, ranks, and the place to resume from."""
