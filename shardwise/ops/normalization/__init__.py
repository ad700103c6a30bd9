"""RMS and L2 normalization, plain, gated, fused with the residual addition, and over a sharded dimension."""
