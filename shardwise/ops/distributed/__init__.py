"""Collective operators on the current tensor-parallel group."""
