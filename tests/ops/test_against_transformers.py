"""Operators against the modules of Transformers that compute the same, on random weights."""

import pytest
import torch
from mamba_oracle import Batch

import shardwise.ops  # noqa: F401  (registers the operators)

transformers = pytest.importorskip("transformers")
OPS = torch.ops.auto_deploy


def bamba_mixer():
    from transformers.models.bamba.modeling_bamba import BambaConfig, BambaMixer

    config = BambaConfig(
        hidden_size=32, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=2, mamba_chunk_size=8,
        num_hidden_layers=1,
    )  # fmt: skip
    return BambaMixer(config, 0)


def mamba2_mixer():
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=1, chunk_size=8, num_hidden_layers=1
    )
    return Mamba2Mixer(config, 0)


def nemotron_mixer():
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHMamba2Mixer

    config = NemotronHConfig(
        hidden_size=32, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=2, chunk_size=8
    )
    return NemotronHMamba2Mixer(config, 0)


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module.eval()


@pytest.mark.parametrize("make", [bamba_mixer, mamba2_mixer, nemotron_mixer])
@pytest.mark.parametrize("pieces", [(21,), (7, 1, 1, 12)])
@torch.no_grad()
def test_a_mamba2_mixer_is_rebuilt_from_operators(make, pieces):
    mixer = randomise(make())
    x = torch.randn(1, 21, 32)
    expected = mixer(x)
    conv_state = torch.zeros(1, mixer.conv_dim, mixer.conv_kernel_size)
    ssm_state = torch.zeros(1, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
    parts, start = [], 0
    for length in pieces:
        batch = Batch((length,), 0, (0,), (start > 0,)) if length > 1 else Batch((), 1, (0,), ())
        parts.append(rebuilt(mixer, x[:, start : start + length], batch, conv_state, ssm_state))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def rebuilt(mixer, x, batch, conv_state, ssm_state):
    metadata = batch.tensors("cpu")
    inner, states = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
    gate, mixed, dt = mixer.in_proj(x).split([inner, mixer.conv_dim, mixer.num_heads], -1)
    K, C = mixer.conv_kernel_size, mixer.conv_dim
    conv = (mixer.conv1d.weight, mixer.conv1d.bias, *metadata, conv_state, 1, K - 1, 1, C, "zeros")
    mixed = torch.nn.functional.silu(OPS.torch_cached_causal_conv1d(mixed, *conv))
    inputs, B, C = mixed.split([inner, states, states], -1)
    inputs = inputs.unflatten(-1, (mixer.num_heads, mixer.head_dim))
    B, C = (t.unflatten(-1, (mixer.n_groups, -1)) for t in (B, C))
    limit = [float(bound) for bound in mixer.time_step_limit]
    scan = (inputs, -mixer.A_log.exp(), B, C, mixer.D, dt, mixer.dt_bias, *metadata, ssm_state, limit, 8)
    y = OPS.torch_cached_ssm(*scan).flatten(-2)
    norm = mixer.norm
    return mixer.out_proj(OPS.torch_rmsnorm_gated(y, norm.weight, gate, norm.variance_epsilon, norm.group_size))


@pytest.mark.parametrize("tokens", [1, 70])
def test_the_gated_delta_rule_is_that_of_qwen3_next(tokens):
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule as theirs

    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(2, tokens, 4, 16), dim=-1) for _ in range(2))
    v, beta, g = torch.randn(2, tokens, 4, 8), torch.rand(2, tokens, 4), -torch.rand(2, tokens, 4)
    expected, _ = theirs(q, k, v, g, beta)
    torch.testing.assert_close(OPS.torch_gated_delta_rule(q, k, v, g, beta), expected, rtol=1e-4, atol=1e-5)


def qwen3_next_mixer():
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=16, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    return Qwen3NextGatedDeltaNet(config, 0)


@pytest.mark.parametrize("pieces", [(21,), (7, 1, 1, 12)])
@torch.no_grad()
def test_a_gated_delta_mixer_is_rebuilt_from_operators(pieces):
    mixer = randomise(qwen3_next_mixer())
    x = torch.randn(1, 21, 32)
    expected = mixer(x)
    conv_state = torch.zeros(1, mixer.conv_dim, mixer.conv_kernel_size)
    state = torch.zeros(1, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim)
    parts, start = [], 0
    for length in pieces:
        batch = Batch((length,), 0, (0,), (start > 0,)) if length > 1 else Batch((), 1, (0,), ())
        parts.append(rebuilt_delta(mixer, x[:, start : start + length], batch, conv_state, state))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def rebuilt_delta(mixer, x, batch, conv_state, state):
    metadata, K, C = batch.tensors("cpu"), mixer.conv_kernel_size, mixer.conv_dim
    q, k, v, z, b, a = mixer.fix_query_key_value_ordering(mixer.in_proj_qkvz(x), mixer.in_proj_ba(x))
    mixed = torch.cat([t.flatten(2) for t in (q, k, v)], -1)
    conv = (mixer.conv1d.weight, None, *metadata, conv_state, 1, K - 1, 1, C, "zeros")
    mixed = torch.nn.functional.silu(OPS.torch_cached_causal_conv1d(mixed, *conv))
    q, k, v = mixed.split([mixer.key_dim, mixer.key_dim, mixer.value_dim], -1)
    q, k = (t.unflatten(-1, (mixer.num_k_heads, -1)) for t in (q, k))
    q, k = (t * (t.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
    v = v.unflatten(-1, (mixer.num_v_heads, -1))
    g = -mixer.A_log.exp() * torch.nn.functional.softplus(a + mixer.dt_bias)
    info, _, bounds, slots, resumes = metadata
    tail = (info, bounds, slots, resumes, state, mixer.head_k_dim**-0.5)
    o = OPS.torch_cached_gated_delta_rule(q, k, v, g, b.sigmoid(), *tail)
    return mixer.out_proj(mixer.norm(o.flatten(0, 2), z.flatten(0, 2)).view(o.shape).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rms_norm_is_that_of_llama(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = randomise(LlamaRMSNorm(64, eps=1e-5)).to(dtype)
    x = 4 * torch.randn(3, 7, 64, dtype=dtype)
    torch.testing.assert_close(OPS.torch_rmsnorm(x, norm.weight, 1e-5), norm(x))


def test_rope_is_that_of_llama_and_deepseek():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    phase = torch.rand(2, 5, 8).repeat(1, 1, 2)
    cos, sin = phase.cos(), phase.sin()
    for ours, theirs in (
        (OPS.torch_rope_with_explicit_cos_sin, apply_rotary_pos_emb),
        (OPS.torch_rope_with_qk_interleaving, apply_rotary_pos_emb_interleave),
    ):
        torch.testing.assert_close(ours(q, k, cos, sin), theirs(q, k, cos, sin))


def test_the_router_is_that_of_gpt_oss():
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssTopKRouter

    router = randomise(GptOssTopKRouter(GptOssConfig(hidden_size=16, num_local_experts=6, num_experts_per_tok=3)))
    x = torch.randn(9, 16)
    _, scores, chosen = router(x)
    expected = torch.zeros(9, 6).scatter_(1, chosen, scores)
    torch.testing.assert_close(OPS.torch_moe_router(x, router.weight, router.bias, 3), expected)
