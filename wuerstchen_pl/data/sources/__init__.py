"""Storage backends: each lists its shards, indexes a shard's samples, and reads an image."""
