"""What `shardwise bench ops` measures: operators at the sizes of real models, each beside its peers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

import shardwise.ops  # noqa: F401  (registers the operators)

OPS = torch.ops.auto_deploy
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One operator at one size; `peers` compute the same by other means, in the same run."""

    operator: str
    size: str
    moved_bytes: int
    """Bytes read and written at least once."""
    call: Callable[[], object]
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)


def norm_cases(tokens: tuple[int, ...], widths: tuple[int, ...]) -> Iterator[Case]:
    """RMS norm, plain, gated and fused with the residual addition."""
    from flashinfer.norm import fused_add_rmsnorm, rmsnorm

    for width in widths:
        weight = torch.rand(width, device="cuda", dtype=DTYPE)
        for rows in tokens:
            x, z, residual = (torch.randn(rows, width, device="cuda", dtype=DTYPE) for _ in range(3))
            size = f"{rows} x {width}"
            once = x.numel() * x.element_size()

            def direct(x=x, weight=weight):
                return rmsnorm(x, weight, 1e-5)

            def fused(x=x, residual=residual, weight=weight):
                return fused_add_rmsnorm(x, residual, weight, 1e-5)

            def ours(name, *args):
                return lambda: getattr(OPS, name)(*args)

            def plain(x=x, weight=weight):
                return torch.rms_norm(x, (x.shape[-1],), weight, 1e-5)

            peers = {"flashinfer": direct, "torch": plain}
            yield Case("triton_rms_norm", size, 2 * once, ours("triton_rms_norm", x, weight, 1e-5), peers)
            yield Case("flashinfer_rms_norm", size, 2 * once, ours("flashinfer_rms_norm", x, weight, 1e-5), peers)
            name = "flashinfer_fused_add_rms_norm_inplace"
            yield Case(name, size, 4 * once, ours(name, x, residual, weight, 1e-5), {"flashinfer": fused})
            gated = (x, weight, z, 1e-5, width // 8, False)
            yield Case("triton_rmsnorm_gated", size, 3 * once, ours("triton_rmsnorm_gated", *gated))


def rope_cases(tokens: tuple[int, ...], heads: int = 32, kv_heads: int = 8, size: int = 128) -> Iterator[Case]:
    """Rotary embeddings of the queries and keys of one layer."""
    from flashinfer.rope import apply_rope_with_cos_sin_cache

    table = torch.randn(16384, size, device="cuda")
    freqs = torch.randn(16384, size // 2, 2, device="cuda")
    for rows in tokens:
        q, k = (torch.randn(1, rows, n, size, device="cuda", dtype=DTYPE) for n in (heads, kv_heads))
        positions = torch.arange(rows, device="cuda", dtype=torch.int32) % 16384
        start = torch.zeros(1, device="cuda", dtype=torch.int32)
        length = torch.full((1,), rows, device="cuda", dtype=torch.int32)
        label, q_bytes, k_bytes = f"{rows} x {heads}/{kv_heads} x {size}", 2 * q.numel() * 2, 2 * k.numel() * 2

        def direct(q=q, k=k, positions=positions):
            return apply_rope_with_cos_sin_cache(
                positions, q.flatten(0, 1).flatten(1), k.flatten(0, 1).flatten(1), size, table
            )

        def ours(name, *args):
            return lambda: getattr(OPS, name)(*args)

        peers = {"flashinfer": direct}
        name = "triton_rope_with_input_pos"
        yield Case(name, label + " (q)", q_bytes, ours(name, q, freqs, start, "bsnd"))
        name = "triton_rope_on_flattened_inputs"
        yield Case(name, label + " (q)", q_bytes, ours(name, q[0], freqs, start, length, start))
        name = "triton_rope_on_interleaved_qk_inputs"
        yield Case(name, label, q_bytes + k_bytes, ours(name, q, k, table, table, positions[None]), peers)
        name = "flashinfer_rope"
        yield Case(name, label, q_bytes + k_bytes, ours(name, q, k, positions, table), peers)


def normalization_cases(full: bool) -> Iterator[Case]:
    """All normalization operators."""
    tokens = (1, 8, 64, 512, 2048, 8192, 16384) if full else (1, 512, 8192)
    yield from norm_cases(tokens, (2880, 4096, 7168) if full else (4096,))
