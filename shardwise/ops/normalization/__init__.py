"""RMS and L2 normalization, plain, gated, fused with the residual addition, and over a sharded dimension.

reference, triton, flashinfer, fla, sharded  the operators
decode, gated_shared                         norms of the runtime: of a decode step, of groups on several ranks
"""
