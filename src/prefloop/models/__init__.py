"""Causal language models: loading, export, adapters and log-probabilities."""
