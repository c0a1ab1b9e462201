"""Correctors: each draws more completions of a group once its own are judged."""
