"""What is in the shards: where each image lies, its checksum and label."""
