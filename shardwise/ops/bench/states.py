"""Cases of `shardwise bench ops` for operators that keep states: state-space scan, convolution, delta rule."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch

from shardwise.ops.bench import cases
from shardwise.ops.bench.cases import DTYPE, OPS, Case, draw

NEMOTRON_H = (128, 64, 128, 8)  # heads, head size, states, groups
BAMBA = (128, 64, 128, 1)
LIMIT = [0.0, math.inf]
CHUNK = 256


def _metadata(prefill: int, length: int, decode: int) -> tuple[torch.Tensor, ...]:
    """batch_info_host, seq_len, cu_seqlen, slot_idx, use_initial_states."""
    lengths = torch.tensor([length] * prefill + [1] * decode, dtype=torch.int32)
    bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0).to(torch.int32)))
    info = torch.tensor([prefill, prefill * length, decode], dtype=torch.int32)
    rest = lengths, bounds, torch.randperm(prefill + decode), torch.ones(prefill + decode, dtype=torch.bool)
    return info, *(t.to(cases.DEVICE) for t in rest)


def _ssm(tokens: int, shape: tuple[int, int, int, int], decode: bool) -> tuple[torch.Tensor, ...]:
    """hidden_states, A, B, C, D, dt, dt_bias."""
    heads, size, states, groups = shape
    lead = (tokens, 1) if decode else (1, tokens)
    A, D, bias = (torch.rand(heads, device=cases.DEVICE) for _ in range(3))
    return (
        draw(*lead, heads, size),
        -A,
        draw(*lead, groups, states),
        draw(*lead, groups, states),
        D,
        draw(*lead, heads),
        bias,
    )


def ssm_decode_cases(batches: tuple[int, ...], shapes: dict[str, tuple[int, int, int, int]]) -> Iterator[Case]:
    """One step of every sequence; bytes are the states, read and written."""
    empty = torch.empty(0, dtype=torch.int32, device=cases.DEVICE)
    for label, shape in shapes.items():
        for cache_dtype in (torch.float32, DTYPE):
            for batch in batches:
                inputs = _ssm(batch, shape, decode=True)
                info, _, bounds, slots, resumes = _metadata(0, 0, batch)
                cache = draw(batch, *shape[:3], dtype=cache_dtype)
                args = (*inputs, info, bounds, slots, resumes, empty, empty, empty, cache, LIMIT, CHUNK)
                peers = {"flashinfer": _direct_step(inputs, slots, cache)}
                size = f"{label} batch {batch} {str(cache_dtype)[6:]}"
                moved = 2 * cache.numel() * cache.element_size()
                yield Case("triton_cached_ssm", size, moved, args, peers)
                yield Case("flashinfer_cached_ssm", size, moved, args, peers)


def _direct_step(inputs: tuple[torch.Tensor, ...], slots: torch.Tensor, cache: torch.Tensor) -> Callable[[], object]:
    from flashinfer.mamba import selective_state_update

    x, A, B, C, D, dt, bias = inputs
    wide = cache.shape[1:]
    steps = dt[:, 0].float()[..., None].expand(-1, -1, wide[1])
    vectors = A[:, None, None].expand(wide), D[:, None].expand(wide[:2]), bias[:, None].expand(wide[:2])
    args = (cache, x[:, 0], steps, vectors[0], B[:, 0], C[:, 0], vectors[1], None, vectors[2], True, slots.int())
    return partial(selective_state_update, *args)


def ssm_prefill_cases(lengths: tuple[int, ...], shape: tuple[int, int, int, int] = NEMOTRON_H) -> Iterator[Case]:
    """One long sequence; bytes are x, B and C read and y written once."""
    for length in lengths:
        inputs = _ssm(length, shape, decode=False)
        info, seq_len, bounds, slots, resumes = _metadata(1, length, 0)
        cache = torch.zeros(1, *shape[:3], device=cases.DEVICE)
        metadata = (torch.zeros(1, length, dtype=torch.int64, device=cases.DEVICE), info, seq_len, bounds, CHUNK)
        pieces = OPS.mamba_ssm_prepare_metadata(*metadata)
        args = (*inputs, info, bounds, slots, resumes, *pieces, cache, LIMIT, CHUNK)
        moved = 2 * (2 * inputs[0].numel() + inputs[2].numel() + inputs[3].numel())
        yield Case("triton_cached_ssm", f"prefill 1 x {length}", moved, args, _scan_peers(inputs))
        yield Case("mamba_ssm_prepare_metadata", f"prefill 1 x {length}", 4 * length, metadata)


def _scan_peers(inputs: tuple[torch.Tensor, ...]) -> dict[str, Callable[[], object]]:
    """The scan in separate kernels (`ssd`), and fla's gated linear attention with one decay a head: the same
    recurrence, its inputs made beforehand."""
    from shardwise.ops.bench.ssd import separate_scan  # names Triton's own classes when it is imported

    x, A, B, C, _, dt, bias = inputs
    state = torch.zeros(*x.shape[2:], B.shape[3], device=x.device)
    peers: dict[str, Callable[[], object]] = {"separate": partial(separate_scan, inputs, state, CHUNK)}
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return peers
    steps = torch.nn.functional.softplus(dt.float() + bias)
    repeat = x.shape[2] // B.shape[2]
    q, k = (t.repeat_interleave(repeat, 2) for t in (C, B))
    peers["fla simple_gla"] = partial(chunk_simple_gla, q, k, (x * steps[..., None]).to(x.dtype), steps * A, scale=1.0)
    return peers


def conv_cases(batches: tuple[int, ...], lengths: tuple[int, ...], channels: int = 8192, K: int = 4) -> Iterator[Case]:
    """Causal convolution, K taps: decode moves inputs and states, prefill the inputs.

    The operators work in place and are timed on their own results, so the weights shrink: nothing becomes infinite.
    """
    weight, bias = draw(channels, K).clamp(-1, 1) / (2 * K), draw(channels)
    for prefill, count in [(False, n) for n in batches] + [(True, n) for n in lengths]:
        x = draw(*((1, count) if prefill else (count, 1)), channels)
        info, seq_len, bounds, slots, resumes = _metadata(1, count, 0) if prefill else _metadata(0, 0, count)
        cache = torch.zeros(slots.numel(), channels, K - 1, device=x.device, dtype=DTYPE)
        tail = (bounds, slots, resumes, cache, 1, K - 1, 1, channels, "zeros", "silu")
        moved = 4 * x.numel() + (0 if prefill else 4 * cache.numel())
        size = f"{'prefill' if prefill else 'decode'} {count} x {channels}"
        yield Case("triton_cached_causal_conv1d", size, moved, (x, weight, bias, info, seq_len, *tail))
        yield Case("cuda_cached_causal_conv1d", size, moved, (x, weight, bias, info, *tail))


def delta_cases(lengths: tuple[int, ...], batches: tuple[int, ...], heads: int = 16, size: int = 128) -> Iterator[Case]:
    """The delta rule beside a direct call of fla's kernels; bytes are q, k, v read and o written, and in decode the
    states read and written. fla's recurrent kernel is given the states in the order of the batch, not by slot."""
    from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    for prefill, count in [(True, n) for n in lengths] + [(False, n) for n in batches]:
        shape = (1, count, heads) if prefill else (count, 1, heads)
        q, k = (torch.nn.functional.normalize(draw(*shape, size).float(), dim=-1).to(DTYPE) for _ in range(2))
        v, beta, g = draw(*shape, size), draw(*shape).sigmoid(), -draw(*shape).float().abs()
        info, _, bounds, slots, resumes = _metadata(1, count, 0) if prefill else _metadata(0, 0, count)
        cache = torch.zeros(slots.numel(), heads, size, size, device=q.device)
        tail = (info, bounds, slots, resumes, cache, size**-0.5)
        label, moved = f"{'prefill' if prefill else 'decode'} {count} x {heads} x {size}", 8 * q.numel()
        moved += 0 if prefill else 2 * cache.numel() * cache.element_size()
        state = {"initial_state": cache, "output_final_state": True}
        if prefill:
            plain, gated = partial(chunk_delta_rule, q, k, v, beta), partial(chunk_gated_delta_rule, q, k, v, g, beta)
            yield Case("fla_delta_rule", label, moved, (q, k, v, beta), {"fla": plain})
            yield Case("fla_gated_delta_rule", label, moved, (q, k, v, g, beta), {"fla": gated})
            plain, gated = partial(plain, **state), partial(gated, **state)
        else:
            plain = partial(fused_recurrent_delta_rule, q, k, v, beta, **state)
            gated = partial(fused_recurrent_gated_delta_rule, q, k, v, g, beta=beta, **state)
        yield Case("fla_cached_delta_rule", label, moved, (q, k, v, beta, *tail), {"fla": plain})
        yield Case("fla_cached_gated_delta_rule", label, moved, (q, k, v, g, beta, *tail), {"fla": gated})


def mamba_cases(full: bool) -> Iterator[Case]:
    """All Mamba operators."""
    yield from conv_cases((1, 64, 256, 1024) if full else (1, 256), (1024, 8192, 32768) if full else (8192,))
    shapes = {"Nemotron-H": NEMOTRON_H, "Bamba": BAMBA} if full else {"Nemotron-H": NEMOTRON_H}
    yield from ssm_decode_cases((1, 8, 64, 256) if full else (1, 256), shapes)
    yield from ssm_prefill_cases((1024, 8192, 32768, 131072) if full else (8192,))


def fla_cases(full: bool) -> Iterator[Case]:
    """All delta-rule operators."""
    yield from delta_cases((1024, 8192, 32768) if full else (8192,), (1, 64, 256) if full else (64,))
