"""Mixture-of-experts operators, and what serves the runtime's experts.

Operators: `reference.py` and `reference_quantized.py` (plain PyTorch), `triton.py` (our kernels), `trtllm.py`
(TRT-LLM's, as FlashInfer ships them: `cutlass.py`). `contract.py` is what all agree on; `exchange.py` moves tokens to
the ranks of their experts.

Who computes depends on the weights and on how many tokens an expert gets:

    routing*, grouping*    top-k and softmax, pairs sorted by expert, the weighted sum of their results
    few*                   one token, or so few that hardly two share an expert: matrix-vector products
    grouped*, wide_gemm    more of them: grouped products; many on Hopper: one warp loads, two warpgroups multiply
    mxfp4*                 packed weights: `_layout` stores them, `_few`, `_stream`, `_gemm` multiply, `_plan` chooses
    int4*                  4-bit integers in groups: grouped products, up to where plain copies of them are faster
    nvfp4                  NVFP4 weights on the kernels of MXFP4
    decode*                the fused decode step's experts of up to four tokens, plain and packed

`tiles.py` names launch shapes, `bench.py` times layers beside peers and floors.
"""
