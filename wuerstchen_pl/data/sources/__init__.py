"""Where pictures are: each kind lists its shards, what a shard holds, and reads a picture."""
