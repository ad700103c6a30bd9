"""What `shardwise bench ops` measures: operators at the sizes of real models, each beside its peers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

import shardwise.ops  # noqa: F401  (registers the operators)

OPS = torch.ops.auto_deploy
DEVICE = "cuda"
DTYPE = torch.bfloat16
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One operator at one size; `peers` compute the same by other means, in the same run."""

    operator: str
    size: str
    moved_bytes: int
    """Bytes read and written at least once."""
    args: tuple
    peers: Mapping[str, Callable[[], object]] = field(default_factory=dict)

    def call(self) -> object:
        """One eager call."""
        return getattr(OPS, self.operator)(*self.args)


def draw(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Normal random numbers on the measured device."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def norm_cases(tokens: tuple[int, ...], widths: tuple[int, ...]) -> Iterator[Case]:
    """RMS norm, plain, gated and fused with the residual addition."""
    from flashinfer.norm import fused_add_rmsnorm, rmsnorm

    for width in widths:
        weight = torch.rand(width, device=DEVICE, dtype=DTYPE)
        for rows in tokens:
            x, z, residual = draw(rows, width), draw(rows, width), draw(rows, width)
            size, once = f"{rows} x {width}", x.numel() * x.element_size()
            direct = partial(rmsnorm, x, weight, EPS)
            peers = {"flashinfer": direct, "torch": partial(torch.rms_norm, x, (width,), weight, EPS)}
            yield Case("triton_rms_norm", size, 2 * once, (x, weight, EPS), peers)
            yield Case("flashinfer_rms_norm", size, 2 * once, (x, weight, EPS), peers)
            fused = {"flashinfer": partial(fused_add_rmsnorm, x, residual, weight, EPS)}
            for backend in ("triton", "flashinfer"):
                yield Case(f"{backend}_fused_add_rms_norm_inplace", size, 4 * once, (x, residual, weight, EPS), fused)
            yield Case("triton_rmsnorm_gated", size, 3 * once, (x, weight, z, EPS, width // 8, False))


def rope_cases(tokens: tuple[int, ...], heads: int = 32, kv_heads: int = 8, size: int = 128) -> Iterator[Case]:
    """Rotary embeddings of the queries and keys of one layer; of the tables a token reads D numbers, 32-bit ones."""
    from flashinfer.rope import apply_rope_with_cos_sin_cache

    table, freqs = draw(16384, size, dtype=torch.float32), draw(16384, size // 2, 2, dtype=torch.float32)
    for rows in tokens:
        q, k = draw(1, rows, heads, size), draw(1, rows, kv_heads, size)
        positions = torch.arange(rows, device=DEVICE, dtype=torch.int32) % 16384
        start = torch.zeros(1, device=DEVICE, dtype=torch.int32)
        length = torch.full((1,), rows, device=DEVICE, dtype=torch.int32)
        label, q_bytes, k_bytes = f"{rows} x {heads}/{kv_heads} x {size}", 4 * (q.numel() + rows * size), 4 * k.numel()
        flat = q.view(rows, -1), k.view(rows, -1)
        peers = {"flashinfer": partial(apply_rope_with_cos_sin_cache, positions, *flat, size, table)}
        yield Case("triton_rope_with_input_pos", label + " (q)", q_bytes, (q, freqs, start, "bsnd"))
        yield Case("triton_rope_on_flattened_inputs", label + " (q)", q_bytes, (q[0], freqs, start, length, start))
        args = (q, k, table, table, positions[None])
        yield Case("triton_rope_on_interleaved_qk_inputs", label, q_bytes + k_bytes, args, peers)
        yield Case("flashinfer_rope", label, q_bytes + k_bytes, (q, k, positions, table), peers)


def normalization_cases(full: bool) -> Iterator[Case]:
    """All normalization operators."""
    tokens = (1, 8, 64, 512, 2048, 8192, 16384) if full else (1, 512, 8192)
    yield from norm_cases(tokens, (2880, 4096, 7168) if full else (4096,))
