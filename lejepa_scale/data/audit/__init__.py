"""Key logs: which sample came when, and whether a log of it is right."""
