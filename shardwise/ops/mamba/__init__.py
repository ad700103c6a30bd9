"""State-space mixers (Mamba2) and their causal convolution."""
