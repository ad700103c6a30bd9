"""Cases of `shardwise bench ops` for operators that keep states: state-space scan, convolution, delta rule."""

import math
from collections.abc import Iterator

import torch

from shardwise.ops.bench_cases import OPS, Case

DTYPE = torch.bfloat16
NEMOTRON_H = {"heads": 128, "size": 64, "states": 128, "groups": 8}
BAMBA = {"heads": 128, "size": 64, "states": 128, "groups": 1}
LIMIT = [0.0, math.inf]
CHUNK = 256


def _metadata(prefill: int, length: int, decode: int) -> tuple[torch.Tensor, ...]:
    """batch_info_host, seq_len, cu_seqlen, slot_idx, use_initial_states."""
    lengths = torch.tensor([length] * prefill + [1] * decode, dtype=torch.int32)
    bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0).to(torch.int32)))
    info = torch.tensor([prefill, prefill * length, decode], dtype=torch.int32)
    slots = torch.randperm(prefill + decode)
    return info, *(t.cuda() for t in (lengths, bounds, slots, torch.ones(prefill + decode, dtype=torch.bool)))


def _ssm(tokens: int, heads: int, size: int, states: int, groups: int, decode: bool) -> tuple[torch.Tensor, ...]:
    """hidden_states, A, B, C, D, dt, dt_bias."""
    shape = (tokens, 1) if decode else (1, tokens)

    def draw(*rest):
        return torch.randn(*shape, *rest, device="cuda", dtype=DTYPE)

    vectors = [torch.rand(heads, device="cuda") for _ in range(3)]
    x, B, C = draw(heads, size), draw(groups, states), draw(groups, states)
    return x, -vectors[0], B, C, vectors[1], draw(heads), vectors[2]


def _call(name: str, *args):
    overload = getattr(OPS, name)
    return lambda: overload(*args)


def ssm_decode_cases(batches: tuple[int, ...]) -> Iterator[Case]:
    """One step of every sequence; bytes are the states, read and written."""
    from flashinfer.mamba import selective_state_update

    for label, shape in (("Nemotron-H", NEMOTRON_H), ("Bamba", BAMBA)):
        for cache_dtype in (torch.float32, DTYPE):
            for batch in batches:
                inputs = _ssm(batch, **shape, decode=True)
                info, _, bounds, slots, resumes = _metadata(0, 0, batch)
                cache = torch.randn(
                    batch, shape["heads"], shape["size"], shape["states"], device="cuda", dtype=cache_dtype
                )
                empty = torch.empty(0, dtype=torch.int32, device="cuda")
                args = (*inputs, info, bounds, slots, resumes, empty, empty, empty, cache, LIMIT, CHUNK)
                x, A, B, C, D, dt, bias = inputs
                wide = (shape["heads"], shape["size"], shape["states"])
                direct = (
                    cache, x[:, 0], dt[:, 0].float()[..., None].expand(-1, -1, wide[1]), A[:, None, None].expand(wide),
                    B[:, 0], C[:, 0], D[:, None].expand(wide[:2]), None, bias[:, None].expand(wide[:2]), True,
                    slots.int(),
                )  # fmt: skip
                peers = {"flashinfer": lambda direct=direct: selective_state_update(*direct)}
                size = f"{label} batch {batch} {str(cache_dtype)[6:]}"
                moved = 2 * cache.numel() * cache.element_size()
                yield Case("triton_cached_ssm", size, moved, _call("triton_cached_ssm", *args), peers)
                yield Case("flashinfer_cached_ssm", size, moved, _call("flashinfer_cached_ssm", *args), peers)


def ssm_prefill_cases(lengths: tuple[int, ...]) -> Iterator[Case]:
    """One long sequence; bytes are x, B and C read and y written once."""
    for length in lengths:
        inputs = _ssm(length, **NEMOTRON_H, decode=False)
        info, seq_len, bounds, slots, resumes = _metadata(1, length, 0)
        cache = torch.zeros(1, 128, 64, 128, device="cuda")
        positions = torch.zeros(1, length, dtype=torch.int64, device="cuda")
        pieces = OPS.mamba_ssm_prepare_metadata(positions, info, seq_len, bounds, CHUNK)
        args = (*inputs, info, bounds, slots, resumes, *pieces, cache, LIMIT, CHUNK)
        moved = 2 * (2 * inputs[0].numel() + inputs[2].numel() + inputs[3].numel())
        size = f"Nemotron-H 1 x {length}"
        yield Case("triton_cached_ssm", size, moved, _call("triton_cached_ssm", *args), _scan_peers(inputs))
        metadata = (positions, info, seq_len, bounds, CHUNK)
        yield Case("mamba_ssm_prepare_metadata", size, 4 * length, _call("mamba_ssm_prepare_metadata", *metadata))


def _scan_peers(inputs) -> dict:
    """fla's gated linear attention with a scalar decay per head: the same recurrence without D and dt's making."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return {}
    x, A, B, C, _, dt, bias = inputs
    steps = torch.nn.functional.softplus(dt.float() + bias)
    repeat = x.shape[2] // B.shape[2]
    q, k = (t.repeat_interleave(repeat, 2) for t in (C, B))
    v, g = (x * steps[..., None]).to(x.dtype), steps * A
    return {"fla simple_gla": lambda: chunk_simple_gla(q, k, v, g, scale=1.0)}


def conv_cases(batches: tuple[int, ...], lengths: tuple[int, ...], channels: int = 8192, K: int = 4) -> Iterator[Case]:
    """Causal convolution, K taps: decode moves inputs and states, prefill the inputs."""
    weight, bias = (
        torch.randn(channels, K, device="cuda", dtype=DTYPE),
        torch.randn(channels, device="cuda", dtype=DTYPE),
    )
    for prefill, count in [(False, n) for n in batches] + [(True, n) for n in lengths]:
        x = torch.randn(*((1, count) if prefill else (count, 1)), channels, device="cuda", dtype=DTYPE)
        info, seq_len, bounds, slots, resumes = _metadata(1, count, 0) if prefill else _metadata(0, 0, count)
        cache = torch.zeros(slots.numel(), channels, K - 1, device="cuda", dtype=DTYPE)
        tail = (slots, resumes, cache, 1, K - 1, 1, channels, "zeros", "silu")
        moved = 4 * x.numel() + (0 if prefill else 4 * cache.numel())
        size = f"{'prefill' if prefill else 'decode'} {count} x {channels}"
        name = "triton_cached_causal_conv1d"
        yield Case(name, size, moved, _call(name, x, weight, bias, info, seq_len, bounds, *tail))
        name = "cuda_cached_causal_conv1d"
        yield Case(name, size, moved, _call(name, x, weight, bias, info, bounds, *tail))


def delta_cases(lengths: tuple[int, ...], batches: tuple[int, ...]) -> Iterator[Case]:
    """The delta rule beside a direct call of fla's kernels; bytes are q, k, v read and o written."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    heads, size = 16, 128
    for prefill, count in [(True, n) for n in lengths] + [(False, n) for n in batches]:
        shape = (1, count, heads) if prefill else (count, 1, heads)
        q, k = (torch.nn.functional.normalize(torch.randn(*shape, size, device="cuda"), dim=-1).to(DTYPE) for _ in "qk")
        v, beta = torch.randn(*shape, size, device="cuda", dtype=DTYPE), torch.rand(shape, device="cuda", dtype=DTYPE)
        g = -torch.rand(shape, device="cuda")
        info, _, bounds, slots, resumes = _metadata(1, count, 0) if prefill else _metadata(0, 0, count)
        cache = torch.zeros(slots.numel(), heads, size, size, device="cuda")
        tail = (info, bounds, slots, resumes, cache, size**-0.5)
        label, moved = f"{'prefill' if prefill else 'decode'} {count} x {heads} x {size}", 8 * q.numel()
        direct = {}
        if prefill:
            yield Case("fla_delta_rule", label, moved, _call("fla_delta_rule", q, k, v, beta), {
                "fla": lambda q=q, k=k, v=v, beta=beta: chunk_delta_rule(q, k, v, beta, output_final_state=False)
            })  # fmt: skip
            direct = {"fla": lambda q=q, k=k, v=v, g=g, beta=beta: chunk_gated_delta_rule(q, k, v, g, beta)}
        else:
            moved += 2 * cache.numel() * cache.element_size()
        name = "fla_cached_delta_rule"
        yield Case(name, label, moved, _call(name, q, k, v, beta, *tail))
        name = "fla_cached_gated_delta_rule"
        yield Case(name, label, moved, _call(name, q, k, v, g, beta, *tail), direct)


def mamba_cases(full: bool) -> Iterator[Case]:
    """All Mamba operators."""
    yield from conv_cases((1, 64, 256, 1024) if full else (1, 256), (1024, 8192, 32768) if full else (8192,))
    yield from ssm_decode_cases((1, 8, 64, 256) if full else (1, 256))
    yield from ssm_prefill_cases((1024, 8192, 32768, 131072) if full else (8192,))


def fla_cases(full: bool) -> Iterator[Case]:
    """All delta-rule operators."""
    yield from delta_cases((1024, 8192, 32768) if full else (8192,), (1, 64) if full else (64,))
