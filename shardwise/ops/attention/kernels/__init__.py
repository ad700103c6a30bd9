"""Triton kernels of attention over an unpaged cache [slots, max_seq, Nkv, D]; launched by `..triton`.

Shared rules: scores live in base 2 (the scale carries log2 e); offsets of a slot, a token or a first key are 64-bit,
offsets inside one tile 32-bit; a sequence whose slot or positions leave the cache reads nothing and gives 0.
"""
