"""Multi-head latent attention: keys and values are expanded from one latent vector a token.

reference, flashinfer    the operators; `checks` and `step` are what they share and what follows from a layout
expand                   keys, values and queries of prompts, as ragged attention reads them
absorb                   rows of each head by its part of a weight
decode, decode_kernels,  a decode step of the runtime, by tiles; on Hopper through a ring of shared memory, whose
decode_ring,             warpgroups have each a role
decode_scores,
decode_tiles
prefill, prefill_kernel  prompts of the runtime, a few heads at a time
"""
