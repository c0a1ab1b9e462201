"""prefloop against its rivals, in turn, on the same weights and data: `python -m benchmarks`."""
