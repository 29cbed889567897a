"""Ranks: the process group, collectives over it, and memory that the ranks of a host share."""
