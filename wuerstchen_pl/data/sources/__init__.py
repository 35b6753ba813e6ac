"""Where images are: each kind lists its shards, what a shard holds, and reads an image."""
