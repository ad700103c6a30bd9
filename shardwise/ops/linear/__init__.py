"""Linear layers and the dense router."""
