"""Operators that compute refuse integers where floats belong: their results would be cut off without a word."""

import pytest
import torch
from operator_samples import Sample, all_samples
from torch.utils._pytree import tree_map

import shardwise.ops as ops

# What moves rows and metadata, or is exact in any dtype.
EXACT = {
    "torch_attention_repeat_kv",
    "torch_onnx_gather_nd",
    "torch_linear_simple",
    "torch_dist_all_gather",
    "torch_dist_all_reduce",
    "trtllm_dist_all_gather",
    "trtllm_dist_all_reduce",
    "torch_utils_fused_gather_scatter",
    "gather_tokens",
    "gather_logits_before_lm_head",
}
COMPUTING = {
    info.qualified_name
    for info in ops.operators()
    if not info.needs and info.name not in EXACT and not info.name.endswith("prepare_metadata")
}
SAMPLES = {sample.qualified_name: sample for sample in reversed(all_samples())}


@pytest.mark.parametrize("sample", [SAMPLES[name] for name in sorted(COMPUTING)], ids=str)
def test_integers_are_refused_by_name(sample: Sample):
    def whole(value):
        return value.to(torch.int32) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    name = sample.op.split("::")[-1]
    with pytest.raises(TypeError, match=f"^{name}: .*(legal|must be)"):
        sample.overload(*tree_map(whole, sample.build("cpu")))


CACHES = [
    pytest.param(SAMPLES[info.qualified_name], cache, id=f"{info.name}-{cache}")
    for info in ops.operators()
    for cache in info.mutates
    if cache.endswith("cache") and all(need.state[0] and need.on_cpu() for need in info.needs)
]


@pytest.mark.parametrize("sample,cache", CACHES)
def test_a_cache_of_integers_is_refused_by_name(sample: Sample, cache: str):
    names = [argument.name for argument in sample.overload._schema.arguments]
    args = list(sample.build("cpu"))
    args[names.index(cache)] = args[names.index(cache)].to(torch.int8)
    with pytest.raises(TypeError, match=f"^{sample.op.split('::')[-1]}: {cache} is torch.int8; legal: floating point"):
        sample.overload(*args)
