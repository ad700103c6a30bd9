"""Norms, rope, linear and utilities: shards against the whole, arguments that are refused, large offsets."""

import pytest
import samples_rope
import torch
import torch.distributed as dist

import shardwise.ops  # noqa: F401  (registers the operators)
from shardwise.ops.registry import TRITON
from shardwise.testing import run_threads

OPS = torch.ops.auto_deploy
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
needs_triton = pytest.mark.skipif(not TRITON.state[0], reason="needs triton")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("parts", [(24, 24), (32, 8, 8), (1, 47)])
def test_a_sharded_norm_weighs_uneven_parts_by_their_length(parts):
    x, weight = torch.randn(2, 3, 48), torch.rand(48)
    shards, weights = x.split(parts, -1), weight.split(parts)

    def rank():
        from shardwise.comm.rank import current_groups

        me = current_groups().tp.rank
        return OPS.sharded_rmsnorm(shards[me], weights[me], 1e-5, len(parts))

    whole = torch.cat(run_threads(len(parts), rank), -1)
    torch.testing.assert_close(whole, OPS.torch_rmsnorm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)


def test_a_sharded_norm_takes_the_default_process_group_where_no_groups_are_set():
    x, weight = torch.randn(2, 8), torch.rand(8)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        result = OPS.sharded_rmsnorm(x, weight, 1e-5, 1)
        with pytest.raises(ValueError, match="world_size = 2"):
            OPS.sharded_rmsnorm(x, weight, 1e-5, 2)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(result, OPS.torch_rmsnorm(x, weight, 1e-5))


def test_a_sharded_norm_for_another_group_size_is_refused():
    with pytest.raises(ValueError, match="world_size = 4, but the current tensor-parallel group has 1 ranks"):
        OPS.sharded_rmsnorm(torch.randn(2, 8), torch.ones(8), 1e-5, 4)


def rope_args():
    return samples_rope.input_pos_args("bsnd")(DEVICE)


def flat_args():
    return samples_rope.flattened_args((3, 2))(DEVICE)


def cached_args():
    return samples_rope.cached_args()(DEVICE)


def on(device, *shape):
    return torch.randn(*shape, device=device)


REFUSED = {
    r"a down weight \[8, I\]": (
        "torch_swiglu_mlp",
        lambda: (on("cpu", 2, 8), on("cpu", 6, 8), on("cpu", 6, 8), on("cpu", 6, 8)),
    ),
    "multiple of 128": (
        "fused_finegrained_fp8_swiglu_mlp",
        lambda: (on("cpu", 2, 8), on("cpu", 12, 8), on("cpu", 8, 6), on("cpu", 1, 1), on("cpu", 1, 1)),
    ),
    "weight": ("torch_rmsnorm_gated", lambda: (on("cpu", 2, 8), on("cpu", 6), None, 1e-5, 4)),
    "group_size 3": ("torch_rmsnorm_gated", lambda: (on("cpu", 2, 8), on("cpu", 8), None, 1e-5, 3)),
    "gate": ("torch_rmsnorm_gated", lambda: (on("cpu", 2, 8), on("cpu", 8), on("cpu", 2, 4), 1e-5, 4)),
    "top_k = 9": ("torch_moe_router", lambda: (on("cpu", 2, 8), on("cpu", 4, 8), on("cpu", 4), 9)),
    "head size": ("torch_rope_with_explicit_cos_sin", lambda: (on("cpu", 1, 1, 1, 7),) * 2 + (on("cpu", 1, 1, 7),) * 2),
    r"\[B, 1, H\]": (
        "gather_logits_before_lm_head",
        lambda: (on("cpu", 2, 3, 4), torch.zeros(2, dtype=torch.int64), torch.tensor([1, 1])),
    ),
    "4 rows are asked for, token_gather_indices holds 2": (
        "gather_tokens",
        lambda: (on("cpu", 1, 9, 4), torch.zeros(2, dtype=torch.int64), torch.tensor([2, 7, 2])),
    ),
    "has 4 entries; legal: 3, or 6 and more": (
        "gather_tokens",
        lambda: (on("cpu", 1, 9, 4), torch.zeros(9, dtype=torch.int64), torch.tensor([2, 7, 2, 2])),
    ),
    "x and residual must agree": (
        "torch_fused_add_rms_norm_inplace",
        lambda: (on("cpu", 2, 8), on("cpu", 2, 6), on("cpu", 8), 1e-5),
    ),
    "5 rows are asked for": (
        "gather_logits_before_lm_head",
        lambda: (on("cpu", 1, 3, 4), torch.zeros(2, dtype=torch.int64), torch.tensor([5, 1])),
    ),
}
REFUSED_BY_KERNELS = {
    "rows of one stride": (
        "triton_fused_add_rms_norm_inplace",
        lambda: (on(DEVICE, 2, 8), on(DEVICE, 1, 8).expand(2, 8), on(DEVICE, 8), 1e-5),
    ),
    "does not match the last dimension": ("triton_rms_norm", lambda: (on(DEVICE, 2, 8), on(DEVICE, 6), 1e-5)),
    "'sbdn'": ("triton_rope_with_input_pos", lambda: (*rope_args()[:3], "sbdn")),
    r"freqs_cis must be \[positions": (
        "triton_rope_with_input_pos",
        lambda: (rope_args()[0], on(DEVICE, 4, 5, 2), *rope_args()[2:]),
    ),
    "1 positions for 3 batch rows": (
        "triton_rope_with_input_pos",
        lambda: (*rope_args()[:2], rope_args()[2][:1], "bsnd"),
    ),
    "must be contiguous": (
        "triton_rope_on_flattened_inputs",
        lambda: (flat_args()[0].transpose(0, 1), *flat_args()[1:]),
    ),
    "need as many input_pos": (
        "triton_rope_on_flattened_inputs",
        lambda: (*flat_args()[:2], flat_args()[2][:1], *flat_args()[3:]),
    ),
    "at least as many heads": (
        "triton_rope_on_interleaved_qk_inputs",
        lambda: (cached_args()[1], cached_args()[0], *cached_args()[2:]),
    ),
    "position_ids must be": (
        "triton_rope_on_interleaved_qk_inputs",
        lambda: (*cached_args()[:4], cached_args()[4][:1]),
    ),
    "2 gather_ids but 3 mask_indices": (
        "triton_utils_fused_gather_scatter",
        lambda: (on(DEVICE, 4), *(torch.zeros(n, dtype=torch.int64, device=DEVICE) for n in (2, 3)), on(DEVICE, 4)),
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_arguments_are_refused_in_words(words):
    name, build = REFUSED[words]
    with pytest.raises(ValueError, match=words) as caught:
        getattr(OPS, name)(*build())
    assert name in str(caught.value)


@needs_triton
@pytest.mark.parametrize("words", REFUSED_BY_KERNELS)
def test_bad_arguments_never_reach_a_kernel(words):
    name, build = REFUSED_BY_KERNELS[words]
    with pytest.raises(ValueError, match=words) as caught:
        getattr(OPS, name)(*build())
    assert name in str(caught.value)


@needs_triton
@pytest.mark.parametrize("start", [62, -1])
def test_a_position_outside_the_table_gives_nan_instead_of_a_wild_read(start):
    x, freqs, _, layout = rope_args()
    positions = torch.full((3,), start, dtype=torch.int32, device=DEVICE)
    out = OPS.triton_rope_with_input_pos(x, freqs, positions, layout)
    known = torch.arange(5) + start
    known = (known >= 0) & (known < 64)
    assert torch.equal(out.isfinite().all(-1).all(-1).cpu(), known.expand(3, 5))


@pytest.mark.gpu
@on_gpu
def test_norms_and_rope_reach_beyond_two_to_the_31_elements():
    rows, width = 2**19 + 8, 4096
    x = torch.empty(rows, width, device="cuda", dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, width, device="cuda")
    weight = torch.rand(width, device="cuda", dtype=torch.bfloat16)
    out = OPS.triton_rms_norm(x, weight, 1e-5)[-8:].clone()
    torch.testing.assert_close(out, OPS.torch_rmsnorm(x[-8:], weight, 1e-5), rtol=2e-2, atol=2e-2)
    freqs = torch.randn(rows, 64, 2, device="cuda")
    start = torch.zeros(1, dtype=torch.int32, device="cuda")
    out = OPS.triton_rope_with_input_pos(x.view(1, rows, 32, 128), freqs, start, "bsnd")[:, -8:].clone()
    tail = OPS.triton_rope_with_input_pos(x[-8:].view(1, 8, 32, 128), freqs[-8:], start, "bsnd")
    assert torch.equal(out, tail)


@pytest.mark.gpu
@on_gpu
def test_operators_replay_in_a_cuda_graph():
    x, weight = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16), torch.rand(512, device="cuda").bfloat16()
    OPS.triton_rms_norm(x, weight, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = OPS.triton_rms_norm(OPS.triton_rms_norm(x, weight, 1e-5), weight, 1e-5)
    x.copy_(torch.randn(8, 512, device="cuda"))
    graph.replay()
    expected = OPS.triton_rms_norm(OPS.triton_rms_norm(x, weight, 1e-5), weight, 1e-5)
    assert torch.equal(out, expected)
