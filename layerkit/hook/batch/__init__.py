"""Many images at once: fleets, shards, one pass."""
