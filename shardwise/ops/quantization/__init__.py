"""Quantised formats: packing helpers, and the quantised linear operators."""
