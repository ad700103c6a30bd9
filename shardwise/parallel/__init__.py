"""The parallel runtime: one rank's decoder, its caches, and the engine that generates with it.

Blocks compute partial sums; `layers.ResidualNorm` and the experts of `moe` add them up over the ranks.

    engine, step_loop           loads a rank's part of a model and generates; every rank calls it alike
    scheduler, batch, requests  continuous batching: which tokens of which requests make the next step
    runner                      runs a step by the fastest code that serves it, and says which and why
    decoder, assemble,          the stack of layers, built from the blocks of a ModelSpec
    assemble_attention,
    assemble_mamba,
    assemble_delta, factors
    layers, attention, rotary,  layers of prompts and of any model; `block_linear` computes with GGUF's blocks and
    mla, head_norms, moe,       integers in groups on the CPU, `float8_linear` and `int4_linear` with float8 weights
    routing, block_linear,      and 4-bit integers on a GPU, by way of a `wide_buffer` for many tokens
    block_groups, block_tiles,
    packed_linear, float8_linear,
    int4_linear, wide_buffer
    mamba, delta, convolution   layers that keep states of a sequence, which stand in `states`
    decode_step, decode_stream, single tokens on a GPU: few fused kernels a layer, replayed as CUDA graphs
    decode_attention,
    decode_mlp, decode_moe,
    decode_states, cuda_graph
    token_step, token_products  single tokens of one sequence on the CPU; of several, `single_tokens` attends
    prefill                     attention to prompts on a GPU, by Triton's, FlashInfer's or PyTorch's kernels
    cache, paged, device_cache, KV caches: rows, pages, and pages whose tables GPU kernels read; states of recurrent
    pool_places, states         layers beside them
    weights, sources, dummy,    weights: the plan's byte ranges of a checkpoint, or random ones in their place
    read_ahead, transfer,
    load_experts, load_float8,
    load_int4, grouped,
    dequantise, storage,
    weight_form, memory
    fitting, sizing,            whether weights, cache and activations fit the memory, and how much the cache gets
    host_memory
    sampler, text, results      tokens from logits, text from tokens, what callers get
    tokenizer, chat, prompts    text to ids; free of torch, as are `options` and `supported`
    options, supported          what a user may ask for, and what the runtime has no layer for
    trace, clock, chrome_trace, measuring: spans of a step, times, traces, bytes that a step must read
    traffic
"""
