"""The papers' headline claims, tested on small worlds: `python -m benchmarks.claims`. Each file here is one claim.

A claim is a description, `CLAIM`, without code of its own; `engine/` runs it. A new file is found by its name.
"""
