"""What the TRT-LLM adapters hand to FlashInfer's kernels: a stand-in with their parameter names checks and computes."""

import enum
import sys
import types

import pytest
import torch
from oracles_moe import e4m3_step, fp8_stack, relative, routed_oracle, routing, stacked

from shardwise.ops.moe import cutlass, trtllm

EXPERTS, HIDDEN, SIZE = 4, 32, 48


class ActivationType(enum.IntEnum):
    Swiglu = 3
    Relu2 = 6


def cutlass_fused_moe(
    input,
    token_selected_experts,
    token_final_scales,
    fc1_expert_weights,
    fc2_expert_weights,
    output_dtype,
    quant_scales,
    output=None,
    activation_type=ActivationType.Swiglu,
):
    """Ids that are not experts are skipped; no token may name an expert twice."""
    ids, weights = token_selected_experts, token_final_scales
    assert input.data_ptr() % 16 == 0
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    for row in ids.tolist():
        local = [expert for expert in row if 0 <= expert < fc1_expert_weights.shape[0]]
        assert len(local) == len(set(local))
    x, first, second, step = input.double(), fc1_expert_weights.double(), fc2_expert_weights.double(), None
    if input.dtype == torch.float8_e4m3fn:
        fc1_dequant, fc2_quant, fc2_dequant, fc1_input_dequant = quant_scales
        assert [scale.dim() for scale in quant_scales] == [1, 0, 1, 0]
        assert all(scale.dtype == torch.float32 for scale in quant_scales)
        x = x * fc1_input_dequant.double()
        first = first * (fc1_dequant / fc1_input_dequant).double()[:, None, None]
        second = second * (fc2_dequant * fc2_quant).double()[:, None, None]
        step = e4m3_step(1 / fc2_quant)
    else:
        assert quant_scales == []
    gated = activation_type == ActivationType.Swiglu
    result = routed_oracle(x, ids, weights, first, second, gated, second_step=step).to(output_dtype)
    return [output.copy_(result)]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    module = types.ModuleType("flashinfer.fused_moe")
    module.ActivationType, module.cutlass_fused_moe = ActivationType, cutlass_fused_moe
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", module)


@pytest.mark.parametrize("gated", [True, False])
def test_weights_ids_and_activation(gated):
    x, (ids, weights) = torch.randn(6 * HIDDEN + 1)[1:].view(6, HIDDEN), routing(6, 3, EXPERTS)
    ids[0], ids[1] = torch.tensor([2, 2, 2]), torch.tensor([-1, EXPERTS, -1])
    stacks = stacked(EXPERTS, HIDDEN, SIZE, gated)
    got = cutlass.cutlass_moe(x, ids, weights, *stacks, "silu" if gated else "relu2", torch.float32, [])
    assert relative(got, routed_oracle(x, ids, weights, *stacks, gated)) < 1e-6


def test_fp8_scales_stand_in_the_order_of_the_kernel(monkeypatch):
    """The operator itself, told that the module is there, on tensors that say they are on a GPU."""
    x, (ids, weights) = torch.randn(5, HIDDEN), routing(5, 2, EXPERTS)
    (q1, s1, v1), (q2, s2, v2) = (fp8_stack(weight) for weight in stacked(EXPERTS, HIDDEN, SIZE, True))
    s_in, s_hidden = torch.tensor(4 / 448), torch.tensor(8 / 448)
    steps = e4m3_step(s_in), e4m3_step(s_hidden)
    wanted = routed_oracle(x, ids, weights, v1, v2, first_step=steps[0], second_step=steps[1])
    monkeypatch.setattr(trtllm, "on_cutlass", lambda rows, first, second, on_input: True)
    monkeypatch.setattr(trtllm, "quantize", lambda rows, scale: (rows / scale).to(torch.float8_e4m3fn))
    got = trtllm.trtllm_quant_fp8_moe_fused(
        x, ids, weights, q1, q2, s_in, s1 * s_in, 1 / s_hidden, s2 * s_hidden, True, 4
    )
    assert relative(got, wanted) < 2e-2


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_the_module_is_used_only_where_it_applies(monkeypatch):
    def taken(
        rows=3, dtype=torch.bfloat16, sizes=(32, 48), codes=torch.bfloat16, on_input=False, kind=OnGpu, begins=(0, 0)
    ):
        x = torch.empty(rows, sizes[0], dtype=dtype).as_subclass(kind)
        weights = [torch.empty(4 * sizes[0] * sizes[1] + 16, dtype=codes)[begin:] for begin in begins]
        first, second = weights[0][: 4 * sizes[0] * sizes[1]], weights[1][: 4 * sizes[0] * sizes[1]]
        return cutlass.on_cutlass(x, first.view(4, sizes[1], sizes[0]), second.view(4, *sizes), on_input)

    monkeypatch.setattr(cutlass, "cutlass_ready", lambda: True)
    assert taken() and taken(dtype=torch.float16) and taken(sizes=(32, 8)) and taken(codes=torch.float8_e4m3fn)
    assert not taken(kind=torch.Tensor) and not taken(0) and not taken(on_input=True)
    assert not taken(dtype=torch.float32) and not taken(sizes=(32, 12)) and not taken(sizes=(44, 48))
    assert not taken(sizes=(32, 8), codes=torch.float8_e4m3fn)
    assert taken(begins=(8, 8)) and not taken(begins=(1, 0)) and not taken(begins=(0, 4))
    monkeypatch.setattr(cutlass, "cutlass_ready", lambda: False)
    assert not taken()
