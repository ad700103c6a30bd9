"""Attention operators, with and without a KV cache. `batch.py` reads batch metadata, `checks.py` checks arguments."""
