"""Attention operators, with and without a KV cache.

`reference.py`, `triton.py`, `flashinfer.py` and `onnx.py` hold the operators. What they share: `batch.py` reads batch
metadata, `checks.py` checks arguments, `scores.py` and `cached.py` are the maths of the reference, `tiles.py` and
`kernels/` the Triton side, `planner.py` keeps FlashInfer's plans, and `flashinfer_step.py` finds out what a step needs.
`decode.py` serves the runtime's fused decode step, with the kernel of `decode_direct.py` where sequences are few, else
with that of `decode_kernel.py`.
"""
