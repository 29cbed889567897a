"""Writing shards, from folders, tars, datasets, or rendered scenes."""
