"""Linear layers.

`reference.py` holds the operators. `decode.py` (matrix-vector products) and `vocab.py` (embedding, greedy choice) serve
the runtime's fused decode step; `float8.py` and `int4.py` its layers whose weights stay float8 and 4-bit integers.
"""
