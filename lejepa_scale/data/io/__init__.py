"""Bytes of shards: files, web servers, object stores, commands, and a cache on the node."""
