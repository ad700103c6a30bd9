"""Tensors on different devices are refused before a kernel gets an address of the wrong one."""

import pytest
import torch
from operator_samples import all_samples

import shardwise.ops as ops
from shardwise.ops.devices import one_device

ON_CUDA = torch.cuda.is_available()
INFOS = {info.name: info for info in ops.operators()}
STATES = ("A", "B", "C", "D", "dt", "dt_bias", "ssm_state_cache")
CONVOLUTION = ("weight", "bias", "conv_state_cache")
RULE = ("q", "k", "v", "beta", "slot_idx", "delta_cache")
PAGED = ("k", "v", "kv_cache", "cu_num_pages", "last_page_len", "flashinfer_batch_indices", "flashinfer_positions")
READ = {
    "triton_rms_norm": ("weight",),
    "triton_rmsnorm_gated": ("weight", "gate"),
    "triton_fused_add_rms_norm_inplace": ("residual", "weight"),
    "triton_rope_with_input_pos": ("freqs_cis", "input_pos"),
    "triton_rope_on_flattened_inputs": ("freqs_cis", "input_pos", "seq_lens", "seq_start_indices"),
    "triton_rope_on_interleaved_qk_inputs": ("k", "cos_cache", "sin_cache", "position_ids"),
    "triton_utils_fused_gather_scatter": ("ungathered_input", "gather_ids", "mask_indices"),
    "triton_attention_flattened_mha_with_cache": ("k", "v", "k_cache", "v_cache", "input_pos", "slot_idx"),
    "triton_cached_ssm": STATES,
    "triton_cached_causal_conv1d": CONVOLUTION,
    "trtllm_quant_fp8_linear": ("weight_fp8", "bias", "input_scale", "weight_scale"),
    "triton_quant_fp8_moe": ("w1_input_scale", "w2_input_scale", "w1_weight_scale", "w2_weight_scale"),
    "trtllm_quant_fp8_moe_fused": (
        "fc1_act_scale",
        "fc1_dequant_scale",
        "fc2_act_scale_reciprocal",
        "fc2_dequant_scale",
    ),
    "trtllm_quant_nvfp4_moe_fused": (
        "fc1_weight_blockscale_fp8",
        "fc2_weight_blockscale_fp8",
        "fc1_act_global_scale",
        "fc2_act_global_scale",
        "fc1_alpha",
        "fc2_alpha",
    ),
    "flashinfer_attention_prepare_metadata": ("cu_seqlen", "seq_len_with_cache"),
    "flashinfer_mla_prepare_metadata": ("cu_seqlen", "seq_len_with_cache"),
    "flashinfer_attention_mha_with_cache": PAGED,
    "flashinfer_mla_with_cache": ("q_pe", "compressed_kv", "kpe", "kv_b_proj_weight", "ckv_cache", "kpe_cache"),
    "flashinfer_rope": ("k", "position_ids", "cos_sin_cache"),
    "flashinfer_cached_ssm": STATES,
    "cuda_cached_causal_conv1d": CONVOLUTION,
    "fla_cached_delta_rule": RULE,
    "fla_cached_gated_delta_rule": (*RULE, "g"),
}
"""What kernels of each operator read by its address, beside its first tensor"""


def runs():
    for name, arguments in READ.items():
        info = INFOS[name]
        if not info.availability()[0] or not (ON_CUDA or all(need.on_cpu() for need in info.needs)):
            continue
        for argument in arguments:
            yield pytest.param(name, argument, id=f"{name}-{argument}", marks=[pytest.mark.gpu] if ON_CUDA else [])


@pytest.mark.parametrize("name,argument", list(runs()))
def test_a_tensor_that_lies_elsewhere_is_refused(name, argument):
    """On a GPU an argument on the CPU, also after a call that was right; in the interpreter one without memory."""
    device, elsewhere = ("cuda", "cpu") if ON_CUDA else ("cpu", "meta")
    for sample in all_samples():
        if sample.qualified_name != INFOS[name].qualified_name:
            continue
        call = sample.overload if ON_CUDA else INFOS[name].implementation  # the dispatcher would take its fake
        place = [each.name for each in sample.overload._schema.arguments].index(argument)
        args = list(sample.build(device))
        if args[place] is None or not args[0].numel():
            continue
        call(*sample.build(device))
        args[place] = args[place].to(elsewhere)
        with pytest.raises(ValueError, match=f"{name}: tensors lie on .*{elsewhere}"):
            call(*args)
        return
    pytest.fail(f"no sample of {name} has {argument}")


def test_the_error_names_both_devices_and_what_is_legal():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert one_device("op", cpu, cpu) == cpu
    with pytest.raises(ValueError, match=r"op: tensors lie on cpu and on meta; legal: one device for all but .*_host"):
        one_device("op", cpu, meta)
