"""Gathers that batches need around the model."""
