"""The step, the loop around it, and what happens between steps."""
