"""Attention operators, with and without a KV cache.

`reference.py`, `triton.py`, `flashinfer.py` and `onnx.py` hold the operators. What they share: `batch.py` reads batch
metadata, `checks.py` checks arguments, `scores.py` and `cached.py` are the maths of the reference, `tiles.py`,
`layout.py` and `kernels/` the Triton side. For FlashInfer, `planner.py` keeps plans, `flashinfer_step.py` finds out
what a step needs, and `positions.py` where each token stands.
`decode.py` serves the runtime's fused decode step, with the kernel of `decode_direct.py` where sequences are few, else
with that of `decode_kernel.py`.
"""
