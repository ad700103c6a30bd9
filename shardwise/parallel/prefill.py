"""Attention of several new tokens a sequence on a GPU: whose kernels serve a layer, and why.

Keys and values of all sequences are concatenated in rows [width], as `LayerShape.split` reads them.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardwise.ops.attention.reference import torch_cached_attention_with_cache
from shardwise.ops.attention.triton import attend_to_cache
from shardwise.ops.mla import decode as latent_decode
from shardwise.ops.mla import prefill as latent_prefill
from shardwise.ops.triton_support import dependent_launch
from shardwise.parallel.batch import Span
from shardwise.parallel.cache import LatentWeights, LayerShape, Masking
from shardwise.parallel.transfer import to_device

HALVES = (torch.float16, torch.bfloat16)
FLASHINFER_SIZES = (64, 128, 256)
TRITON_SIZE = 256
"""Most elements of a head: its tiles lie in shared memory."""
WORKSPACE_BYTES = 256 << 20


@dataclass(frozen=True)
class Choice:
    """Which kernels attend to a layer's prefill tokens."""

    name: str
    reason: str


def choose(wanted: str, shape: LayerShape, masking: Masking, dtype: torch.dtype) -> Choice:
    """The kernels for one layer. ValueError when those that are wanted by name cannot serve it.

    auto: Triton's, which take windows, sinks and caps and need no compiler on the machine. One H100 ran them at 1.28
    to 1.34 times the rate of FlashInfer's FA2 kernels for prompts of 1k to 16k tokens and for a 2k piece behind 14k,
    at the same rate for eight prompts of 1k at once (benchmarks/results/ops-attention-h100.json). PyTorch's for larger
    heads.
    """
    reasons = {
        "triton": _against_triton(shape),
        "flashinfer": _against_flashinfer(shape, masking, dtype),
        "torch": "",
    }
    if wanted == "auto":
        if reasons["triton"]:
            return Choice("torch", f"auto: Triton's kernels have no {reasons['triton']}")
        return Choice("triton", "auto: 1.0 to 1.3 times FlashInfer's rate; windows, sinks and caps included")
    if reasons[wanted]:
        raise ValueError(f"attention {wanted} cannot serve this model: {reasons[wanted]}; use attention auto")
    return Choice(wanted, "asked for by name")


def choose_latent(wanted: str, shape: LayerShape, weights: LatentWeights) -> Choice:
    """As `choose`, for a layer with latent attention: kernels of ours for prompts and single tokens, or PyTorch's."""
    value, rope = weights.value_up.shape[2], shape.width - weights.rank
    reason = latent_decode.reason_against(weights.nope, weights.rank, rope) or latent_prefill.reason_against(
        weights.nope, rope, value
    )
    if wanted == "auto":
        return Choice("torch", f"auto: {reason}") if reason else Choice("triton", "auto: latents expanded for prompts")
    if wanted == "triton" and not reason:
        return Choice("triton", "asked for by name")
    if wanted == "torch":
        return Choice("torch", "asked for by name")
    reason = reason or "latents in pages of their own"
    raise ValueError(f"attention {wanted} cannot serve this model: {reason}; use attention auto")


def _against_triton(shape: LayerShape) -> str:
    return f"head sizes above {TRITON_SIZE}" if max(shape.head_dim, shape.v_head_dim) > TRITON_SIZE else ""


def _against_flashinfer(shape: LayerShape, masking: Masking, dtype: torch.dtype) -> str:
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    if not masking.is_plain:
        return "attention sinks or capped scores"
    if dtype not in HALVES:
        return f"its kernels take 16-bit floats, not {str(dtype).removeprefix('torch.')}"
    if shape.head_dim != shape.v_head_dim or shape.head_dim not in FLASHINFER_SIZES:
        return f"head sizes {shape.head_dim} and {shape.v_head_dim}, it has {', '.join(map(str, FLASHINFER_SIZES))}"
    return ""


class PrefillStep:
    """The sequences of one step that bring several tokens, the same for all layers."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        self.spans, self.device = tuple(spans), device
        self.tokens = sum(span.length for span in spans)
        self.longest = max(span.total for span in spans)
        self.plans: dict[Any, Any] = {}
        """What a backend has prepared for this step."""

    @cached_property
    def info(self) -> Tensor:
        return torch.tensor([len(self.spans), self.tokens, 0], dtype=torch.int32)

    def runs(self) -> Iterator[latent_prefill.Run]:
        """Each sequence's queries, and where its keys are."""
        query = key = 0
        for span in self.spans:
            yield latent_prefill.Run(query, span.length, key, span.past)
            query, key = query + span.length, key + span.total

    @property
    def continues(self) -> bool:
        """Whether the cache already holds tokens of some sequence."""
        return any(span.past for span in self.spans)

    @cached_property
    def places(self) -> "Places":
        spans = self.spans
        rows = (
            [span.length for span in spans],
            [span.past for span in spans],
            list(accumulate((span.total for span in spans), initial=0)),
            list(accumulate((span.length for span in spans), initial=0)),
        )
        return Places(*to_device([torch.tensor(row, dtype=torch.int32) for row in rows], self.device))


class Places(NamedTuple):
    """Of a step's sequences, int32."""

    lengths: Tensor
    """[sequences], new tokens"""
    past: Tensor
    """[sequences], tokens before them"""
    starts: Tensor
    """[sequences + 1]: where each one's keys begin"""
    query_starts: Tensor
    """[sequences + 1]: where each one's queries begin"""


class PrefillAttention:
    """Attends to whole sequences with one backend."""

    def __init__(self, device: torch.device):
        self._device = device

    def __call__(
        self,
        choice: Choice,
        q: Tensor,
        kv: Tensor,
        rows: Tensor,
        step: PrefillStep,
        shape: LayerShape,
        masking: Masking,
    ) -> Tensor:
        """q [T, N, D] -> [T, N, Dv].

        kv    [T, width], of the new tokens
        rows  [all tokens + step.longest, width], with space for the new ones, which FlashInfer's kernels require
              to be there already; rows after the last are not read
        """
        if choice.name == "flashinfer":
            return self._flashinfer(q, rows, step, shape, masking)
        keys, values = shape.split(_overlapping(rows, step.longest))
        new = q[None], *shape.split(kv[None])
        lengths, past, starts, query_starts = step.places
        places = step.info, lengths, past, starts[:-1]
        options = masking.scale, masking.sinks, masking.window
        if choice.name == "triton":
            return attend_to_cache(*new, *places, keys, values, *options, masking.softcap)[0]
        return torch_cached_attention_with_cache(*new, *places, query_starts, keys, values, *options, masking.softcap)[
            0
        ]

    def latents(self, q: Tensor, rows: Tensor, step: PrefillStep, weights: LatentWeights, scale: float) -> Tensor:
        """q [T, N, P + R] and rows [all tokens, C + R], the new ones included -> [T, N, Dv]."""
        tile = latent_prefill.tile_for(step.tokens // len(step.spans), q.element_size())
        if tile not in step.plans:
            tiles = torch.tensor(latent_prefill.runs_in_tiles(step.runs(), tile.queries), dtype=torch.int32)
            step.plans[tile] = to_device([tiles], self._device)[0]
        weighted = weights.key_up, weights.value_up
        pdl = dependent_launch(self._device)
        return latent_prefill.latent_prefill_attention(q, rows, *weighted, step.plans[tile], tile, scale=scale, pdl=pdl)

    @cached_property
    def _workspace(self) -> Tensor:
        return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)

    def _flashinfer(self, q: Tensor, rows: Tensor, step: PrefillStep, shape: LayerShape, masking: Masking) -> Tensor:
        rows = rows[: rows.shape[0] - step.longest]
        key = (q.shape[1], shape, masking.scale, masking.window)
        if key not in step.plans:
            step.plans[key] = self._planned(q, step, shape, masking)
        return step.plans[key].run(q, *shape.split(rows))

    def _planned(self, q: Tensor, step: PrefillStep, shape: LayerShape, masking: Masking) -> Any:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        wrapper = BatchPrefillWithRaggedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
        wrapper.plan(
            step.places.query_starts,
            step.places.starts,
            q.shape[1],
            shape.kv_heads,
            shape.head_dim,
            causal=True,
            sm_scale=masking.scale,
            window_left=-1 if masking.window is None else masking.window - 1,
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
        )
        return wrapper


def _overlapping(rows: Tensor, length: int) -> Tensor:
    """Rows [R + length, width] as R caches [R, length, width], each one row after the other.

    A sequence's first row then is its cache slot, and sequences of any lengths need no padding between them.
    """
    row = rows.stride(0)
    return rows.as_strided((rows.shape[0] - length, length, rows.shape[1]), (row, row, 1))
