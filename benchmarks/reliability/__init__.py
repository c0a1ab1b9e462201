"""What a kill, a damage or a full disk does to a run: `python -m benchmarks.reliability` writes docs/reliability.md."""
