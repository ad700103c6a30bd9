"""Checkpoint readers: headers without torch, and the loader that reads one rank's ranges."""
