"""Samplers: one file, one way to draw completions from a policy."""
