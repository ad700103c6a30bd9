"""Norms, rope, linear and utilities: shards against the whole, arguments that are refused, large offsets."""

import pytest
import samples_rope
import torch
import torch.distributed as dist

import shardwise.ops  # noqa: F401  (registers the operators)
from shardwise.ops.normalization import triton as triton_norms
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
    r"gate_weight is \(1, 8\), gate_bias None; legal for these inputs: \(6, 8\)": (
        "torch_swiglu_mlp",
        lambda: (on("cpu", 2, 8), on("cpu", 1, 8), on("cpu", 6, 8), on("cpu", 8, 6)),
    ),
    r"gate_up_weight is \(13, 8\)": ("fused_swiglu_mlp", lambda: (on("cpu", 2, 8), on("cpu", 13, 8), on("cpu", 8, 6))),
    r"gate_weight \(5, 8\) must have the shape of up_weight": (
        "torch_finegrained_fp8_swiglu_mlp",
        lambda: (on("cpu", 2, 8), on("cpu", 5, 8), on("cpu", 6, 8), on("cpu", 8, 6), *(on("cpu", 1, 1),) * 3),
    ),
    r"weight \(5, 7\) and bias None do not fit": (
        "torch_linear_simple",
        lambda: (on("cpu", 2, 8), on("cpu", 5, 7), None),
    ),
    r"weight \(4, 8\) and bias \(1,\) do not fit": (
        "torch_moe_router",
        lambda: (on("cpu", 2, 8), on("cpu", 4, 8), on("cpu", 1), 2),
    ),
    r"weight \(1,\) does not match the last dimension of input \(2, 8\)": (
        "torch_rmsnorm",
        lambda: (on("cpu", 2, 8), on("cpu", 1), 1e-5),
    ),
    r"weight \(3, 8\) does not match the last dimension of input \(3, 8\)": (
        "sharded_rmsnorm",
        lambda: (on("cpu", 3, 8), on("cpu", 3, 8), 1e-5, 1),
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
    r"x \(1, 1, 3, 6\), angles for size 8": (
        "torch_rope_with_explicit_cos_sin",
        lambda: (on("cpu", 1, 2, 3, 8), on("cpu", 1, 1, 3, 6), *(on("cpu", 1, 3, 8) for _ in range(2))),
    ),
    r"\(1, 4, 8\) with unsqueeze_dim 1 do not fit x \(1, 2, 3, 8\)": (
        "torch_rope_with_qk_interleaving",
        lambda: (*(on("cpu", 1, 2, 3, 8) for _ in range(2)), *(on("cpu", 1, 4, 8) for _ in range(2))),
    ),
    "unsqueeze_dim 3 does not belong to": (
        "torch_rope_with_complex_freqs",
        lambda: (*(on("cpu", 1, 2, 3, 8) for _ in range(2)), on("cpu", 1, 3, 4).to(torch.complex64), 3),
    ),
    r"logits_gather_info_host must be \[2\], got \(3,\)": (
        "gather_logits_before_lm_head",
        lambda: (on("cpu", 1, 3, 4), torch.zeros(2, dtype=torch.int64), torch.tensor([1, 1, 1])),
    ),
    "token_gather_indices reaches from 0 to 9; legal: 0 to 8": (
        "gather_tokens",
        lambda: (on("cpu", 1, 9, 4), torch.arange(10), torch.tensor([2, 7, 8])),
    ),
    "stride 1, padding 0, dilation 9 give 0 outputs for 5 tokens": (
        "torch_causal_conv1d",
        lambda: (on("cpu", 1, 5, 6), on("cpu", 6, 2, 3), None, 1, 0, 9, 3),
    ),
    r"have shapes \[3\] and \[1, 2\]; legal: one dimension": (
        "flashinfer_attention_prepare_metadata",
        lambda: (torch.zeros(1, 4), torch.tensor([1, 3, 1]), torch.tensor([0, 3, 4]), torch.tensor([[3, 4]])),
    ),
    "-1 rows are asked for": (
        "gather_logits_before_lm_head",
        lambda: (on("cpu", 1, 3, 4), torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 1])),
    ),
    r"token_gather_indices must be int32 or int64 \[n or more\], got torch.int64 \[1, 9\]": (
        "gather_tokens",
        lambda: (on("cpu", 1, 9, 4), torch.zeros(1, 9, dtype=torch.int64), torch.tensor([2, 7, 1])),
    ),
    r"\(1, 5, 6\), \(4, 2, 3\) and \(5,\) with groups 3": (
        "torch_causal_conv1d",
        lambda: (on("cpu", 1, 5, 6), on("cpu", 4, 2, 3), on("cpu", 5), 1, 2, 1, 3),
    ),
    "stride 0, padding 2, dilation 1; legal": (
        "torch_causal_conv1d",
        lambda: (on("cpu", 1, 5, 6), on("cpu", 6, 2, 3), None, 0, 2, 1, 3),
    ),
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
    r"up_weight is \(6, 8\), up_bias \(1,\)": (
        "triton_swiglu_mlp",
        lambda: (on(DEVICE, 2, 8), *(on(DEVICE, 6, 8),) * 2, on(DEVICE, 8, 6), None, on(DEVICE, 1)),
    ),
    r"gate_weight is \(9, 8\)": (
        "triton_swiglu_mlp",
        lambda: (on(DEVICE, 2, 8), on(DEVICE, 9, 8), on(DEVICE, 6, 8), on(DEVICE, 8, 6)),
    ),
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
    "3 gather_ids but 2 mask_indices": (
        "triton_utils_fused_gather_scatter",
        lambda: (on(DEVICE, 4), *(torch.zeros(n, dtype=torch.int64, device=DEVICE) for n in (3, 2)), on(DEVICE, 4)),
    ),
}


def test_a_rotation_reads_heads_that_begin_at_any_element():
    rotation = torch.polar(torch.ones(1, 3, 4), torch.rand(1, 3, 4))
    wide = torch.randn(1, 3, 2, 11)
    q, k = wide[..., 1:9], torch.randn(1, 3, 1, 8)
    results = OPS.torch_rope_with_complex_freqs(q, k, rotation)
    for result, given in zip(results, (q, k), strict=True):
        pairs = torch.complex(given[..., 0::2], given[..., 1::2]) * rotation[:, :, None]
        torch.testing.assert_close(result, torch.view_as_real(pairs).flatten(-2))


def test_a_complex_rotation_by_real_numbers_is_refused():
    x = torch.randn(1, 3, 2, 8)
    with pytest.raises(TypeError, match="torch_rope_with_complex_freqs: freqs_cis is torch.float32; legal: complex64"):
        OPS.torch_rope_with_complex_freqs(x, x, torch.randn(1, 3, 4))


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
def test_kernels_refuse_other_types_in_words():
    x, freqs, start, layout = rope_args()
    for types in ((x, freqs, start.float()), (x.int(), freqs, start), (x, freqs.to(torch.complex64), start)):
        with pytest.raises(TypeError, match="triton_rope_with_input_pos: came .*; legal: floating point, and int32 or"):
            OPS.triton_rope_with_input_pos(*types, layout)
    with pytest.raises(TypeError, match="triton_rms_norm: came torch.int64, torch.float32; legal: floating point"):
        OPS.triton_rms_norm(on(DEVICE, 2, 8).long(), on(DEVICE, 8), 1e-5)
    with pytest.raises(TypeError, match="gather_ids must be int32 or int64, got torch.float32"):
        OPS.triton_utils_fused_gather_scatter(*(on(DEVICE, 4) for _ in range(4)))


@needs_triton
@pytest.mark.parametrize("start", [62, -1])
def test_a_position_outside_the_table_gives_nan_instead_of_a_wild_read(start):
    x, freqs, _, layout = rope_args()
    positions = torch.full((3,), start, dtype=torch.int32, device=DEVICE)
    out = OPS.triton_rope_with_input_pos(x, freqs, positions, layout)
    known = torch.arange(5) + start
    known = (known >= 0) & (known < 64)
    assert torch.equal(out.isfinite().all(-1).all(-1).cpu(), known.expand(3, 5))


FAR = 2**19 + 8  # rows of 4096 elements: the last eight lie beyond 2^31


@pytest.fixture
def far(much_memory):
    """[FAR, 4096] bfloat16 whose last eight rows hold numbers."""
    x = torch.empty(FAR, 4096, device="cuda", dtype=torch.bfloat16)
    x[-8:] = torch.randn(8, 4096, device="cuda")
    return x


def norm_far():
    weight = torch.rand(4096, device="cuda", dtype=torch.bfloat16)
    return lambda x: OPS.triton_rms_norm(x, weight, 1e-5)


def gated_norm_far():
    weight = torch.rand(4096, device="cuda", dtype=torch.bfloat16)
    return lambda x: OPS.triton_rmsnorm_gated(x, weight, x, 1e-5, 512)


def fused_add_far():
    weight = torch.rand(4096, device="cuda", dtype=torch.bfloat16)

    def call(x):
        x = x.clone()
        OPS.triton_fused_add_rms_norm_inplace(x, x.clone(), weight, 1e-5)
        return x

    return call


def rope_far():
    freqs, start = torch.randn(FAR, 64, 2, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    return lambda x: OPS.triton_rope_with_input_pos(x.view(1, -1, 32, 128), freqs[-len(x) :], start, "bsnd")[0]


def flat_rope_far():
    freqs, start = torch.randn(FAR, 64, 2, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")

    def call(x):
        length = torch.full((1,), len(x), device="cuda")
        return OPS.triton_rope_on_flattened_inputs(x.view(-1, 32, 128), freqs[-len(x) :], start, length, start)

    return call


def interleaved_rope_far():
    table, positions = torch.randn(64, 128, device="cuda"), torch.arange(FAR, device="cuda") % 64

    def call(x):
        heads = x.view(1, -1, 32, 128)
        return OPS.triton_rope_on_interleaved_qk_inputs(
            heads, heads[:, :, :1], table, table, positions[None, -len(x) :]
        )[0][0]

    return call


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    "prepare", [norm_far, gated_norm_far, fused_add_far, rope_far, flat_rope_far, interleaved_rope_far]
)
def test_operators_reach_beyond_two_to_the_31_elements(far, prepare):
    call = prepare()
    # Of 2048 rows, since fewer have other tiles, and with them another product of a sum that is rounded first.
    assert torch.equal(call(far)[-8:], call(far[-2048:])[-8:])


@pytest.mark.gpu
@on_gpu
def test_heads_may_lie_two_to_the_31_elements_apart(much_memory):
    tokens = 2**23 + 8  # of 128 elements: the third head begins beyond 2^31
    x = torch.empty(1, 3, tokens, 128, device="cuda", dtype=torch.bfloat16)
    x[:, :, -8:] = torch.randn(1, 3, 8, 128, device="cuda")
    freqs, start = torch.randn(8, 64, 2, device="cuda"), torch.full((1,), 8 - tokens, dtype=torch.int32, device="cuda")
    out = OPS.triton_rope_with_input_pos(x, freqs, start, "bnsd")[:, :, -8:]
    near = OPS.triton_rope_with_input_pos(x[:, :, -8:].contiguous(), freqs, torch.zeros_like(start), "bnsd")
    assert torch.equal(out, near)


@pytest.mark.gpu
@on_gpu
def test_gathers_reach_beyond_two_to_the_31_elements(much_memory):
    source = torch.empty(2**31 + 64, device="cuda", dtype=torch.uint8)
    source[-8:] = torch.arange(8, device="cuda", dtype=torch.uint8) + 1
    ids = torch.arange(8, device="cuda")
    for backend in ("triton", "torch"):
        gather_scatter = getattr(OPS, f"{backend}_utils_fused_gather_scatter")
        out = torch.zeros(8, device="cuda", dtype=torch.uint8)
        gather_scatter(source[:64], ids, ids, out)
        gather_scatter(source, ids + len(source) - 8, ids, out)
        assert out.tolist() == list(range(1, 9))
        target = torch.zeros_like(source)
        gather_scatter(out, ids, ids + len(source) - 8, target)
        assert torch.equal(target[-8:], out) and not target[:-8].any()


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


@pytest.mark.parametrize("elements", [64, 1536, 3072, 4096, 8192, 24576])
@pytest.mark.parametrize("programs", [1, 500, 100_000])
@pytest.mark.parametrize("gated", [False, True])
def test_a_norms_program_has_a_power_of_two_of_warps(elements, programs, gated):
    warps = triton_norms._warps(programs, elements, gated, torch.device("cpu"))
    assert warps in (2, 4, 8, 16)
