"""Where a tensor lies in memory does not matter, or it is refused: any strides, addresses that no vector begins at."""

import copy

import pytest
import torch
from operator_samples import Sample, flat, mutated
from test_operator_table import RUNS, build, outcome

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore::RuntimeWarning")


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with one of another kind behind each."""
    if tensor.dim() == 0:
        return tensor
    wide = torch.full((*tensor.shape, 2), 77, device=tensor.device).to(tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, one element behind where memory begins."""
    if tensor.dim() == 0:
        return tensor
    room = torch.full((tensor.numel() + 1,), 77, device=tensor.device).to(tensor.dtype)
    room[1:].view(tensor.shape).copy_(tensor)
    return room[1:].view(tensor.shape)


MIXTURE = ("w1_stacked_weight", "w2_stacked_weight")
REFUSED = {
    (apart, "triton_attention_flattened_mha_with_cache"): ("k_cache", "v_cache"),
    (apart, "flashinfer_attention_mha_with_cache"): ("kv_cache",),
    (moved, "flashinfer_attention_mha_with_cache"): ("kv_cache",),
    (apart, "flashinfer_mla_with_cache"): ("ckv_cache", "kpe_cache"),
    (moved, "flashinfer_mla_with_cache"): ("ckv_cache", "kpe_cache"),
    (apart, "triton_rope_on_flattened_inputs"): ("x",),
    (apart, "triton_moe_fused"): MIXTURE,
    (apart, "trtllm_moe_fused"): ("w3_w1_stacked_weight", "w2_stacked_weight"),
    (apart, "triton_quant_fp8_moe"): ("w1_weight", "w2_weight"),
    (apart, "trtllm_quant_fp8_moe_fused"): ("fc1_expert_weights", "fc2_expert_weights"),
    (apart, "triton_mxfp4_moe"): ("gate_up_blocks", "down_blocks"),
    (apart, "triton_mxfp4_moe_ep"): ("gate_up_blocks", "down_blocks"),
    (apart, "triton_fused_add_rms_norm_inplace"): ("x", "residual"),
    (apart, "flashinfer_fused_add_rms_norm_inplace"): ("x", "residual"),
    (moved, "flashinfer_fused_add_rms_norm_inplace"): ("x", "residual"),
    (apart, "triton_cached_ssm"): ("ssm_state_cache",),
    (apart, "flashinfer_cached_ssm"): ("ssm_state_cache",),
    (moved, "flashinfer_cached_ssm"): ("ssm_state_cache",),
    (apart, "fla_cached_delta_rule"): ("delta_cache",),
    (apart, "fla_cached_gated_delta_rule"): ("delta_cache",),
    (apart, "torch_utils_fused_gather_scatter"): ("out",),
    (apart, "triton_utils_fused_gather_scatter"): ("out",),
}
"""What must lie dense: weights that a copy at each call would make slow, and caches that are written in place"""


def arranged(value, how):
    if isinstance(value, torch.Tensor):
        return how(value)
    return [arranged(item, how) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("sample,device", [run for run in RUNS if run.values[0].traced])
@pytest.mark.parametrize("how", [apart, moved], ids=lambda how: how.__name__)
def test_memory_layouts_give_the_same_or_are_refused(sample: Sample, device, how):
    names = [argument.name for argument in sample.overload._schema.arguments]
    refused = REFUSED.get((how, sample.op), ())
    args = dict(zip(names, build(sample, device), strict=False))
    for name in refused:
        with pytest.raises(ValueError, match=sample.overload._opname):
            sample.overload(**copy.deepcopy(args) | {name: how(args[name])})
    given = {name: value if name in refused else arranged(value, how) for name, value in args.items()}
    results = flat(sample.overload(**given)) + mutated(sample.overload, tuple(given.values()))
    _, wanted, changed = outcome(sample, device)
    for result, want in zip(results, wanted + changed, strict=True):
        torch.testing.assert_close(result.float(), want.float(), rtol=1e-5, atol=max(sample.atol, 1e-5))
