"""The KV cache of a GPU: pages of a common pool, with page tables that the decode kernels read on the device."""

import torch
from torch import Tensor

from shardwise.ops.attention.decode import DecodeWorkspace, fused_decode_attention, splits_for, takes_head_size
from shardwise.ops.mla.decode import LatentWorkspace, latent_decode_attention
from shardwise.ops.triton_support import dependent_launch, multiprocessors
from shardwise.parallel.batch import Batch, Span
from shardwise.parallel.cache import KvCache, LatentWeights, LayerShape, Masking
from shardwise.parallel.options import DEVICE_PAGE
from shardwise.parallel.paged import PageTables
from shardwise.parallel.pool_places import Part, StepPlaces
from shardwise.parallel.prefill import Choice, PrefillAttention, choose, choose_latent
from shardwise.parallel.states import StateCache

PAGE_SIZE = DEVICE_PAGE


class DeviceCache(KvCache):
    """[pages, PAGE_SIZE, width] a layer. Windows need fewer pages.

    Sequences with several new tokens are attended to by a prefill backend, over a copy of their pages, whose bytes are
    few beside the products of so many tokens; those with one new token read their pages in place.
    """

    def __init__(
        self,
        layers: list[LayerShape],
        *,
        pages: int,
        slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        attention: str = "auto",
    ):
        self.slots, self.dtype, self.device = slots, dtype, device
        self.tables = PageTables(layers, pages=pages, slots=slots, page_size=PAGE_SIZE)
        self.max_length = min(-(-max_length // PAGE_SIZE), pages) * PAGE_SIZE
        places = len(self.tables.of), slots, self.max_length // PAGE_SIZE
        self.page_tables = torch.zeros(places, dtype=torch.int32, device=device)
        """[tables, slots, pages]: page numbers of each slot's sequence, in the order of `tables.of`."""
        self._table_of = dict(zip(self.tables.of, self.page_tables, strict=True))
        self.layers = layers
        self._pools = [
            torch.empty(
                self.tables.of[s.window].pages,
                PAGE_SIZE,
                s.width,
                dtype=dtype,
                device=device,
            )
            for s in layers
        ]
        states = [shape.state for shape in layers]
        self.states = StateCache(states, slots=slots, dtype=dtype, device=device, kernels=True)
        self.attention, self._prefill = attention, PrefillAttention(device)
        self._choices: dict[tuple, Choice] = {}
        self._step: tuple[Batch, StepPlaces] | None = None
        self._workspaces: dict[tuple[int, int, int], DecodeWorkspace] = {}
        self._latent_workspaces: dict[tuple[int, int], LatentWorkspace] = {}
        self._processors = multiprocessors(device)

    def reserve(self, slot: int, tokens: int) -> bool:
        return tokens <= self.max_length and self.tables.reserve(slot, tokens)

    def release(self, slot: int) -> None:
        self.tables.release(slot)
        self.states.clear(slot)

    def pages_of(self, span: Span) -> list[int]:
        """Of each table: the page that holds the first new token of a sequence."""
        return [table.page(span.slot, span.past) for table in self.tables.of.values()]

    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools) + self.states.nbytes()

    def describe_attention(self) -> str:
        """Which prefill backends have served, and why."""
        found = dict.fromkeys(f"{choice.name} ({choice.reason})" for choice in self._choices.values())
        return ", ".join(found) or "none yet"

    def table(self, layer: int) -> Tensor:
        """int32 [slots, pages]: where the tokens of each slot's sequence are in this layer."""
        return self._table_of[self.layers[layer].window]

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [pages, PAGE_SIZE, Nkv, D] and values [.., Dv], views."""
        return self.layers[layer].split(self._pools[layer])

    def workspace(self, heads: int, kv_heads: int, head_dim: int) -> DecodeWorkspace:
        """What decode attention of such layers keeps between calls; a step's layers run one after another."""
        key = (heads, kv_heads, head_dim)
        if key not in self._workspaces:
            runs = max(batch * self.splits(kv_heads, None, batch) for batch in range(1, self.slots + 1))
            self._workspaces[key] = DecodeWorkspace.create(runs, *key, 1, self.device)
        return self._workspaces[key]

    def latents(self, layer: int) -> Tensor:
        """[pages, PAGE_SIZE, C + R] of a layer with latent attention."""
        return self._pools[layer]

    def latent_workspace(self, weights: LatentWeights) -> LatentWorkspace:
        """As `workspace`, for attention to latents."""
        key = (weights.heads, weights.rank)
        if key not in self._latent_workspaces:
            self._latent_workspaces[key] = LatentWorkspace.create(self.slots, *key, self.device)
        return self._latent_workspaces[key]

    def splits(self, kv_heads: int, window: int | None, batch: int) -> int:
        """Runs that the keys of each of `batch` sequences are cut into."""
        return splits_for(batch, kv_heads, min(self.max_length, window or self.max_length), self._processors)

    def attend(self, layer: int, q: Tensor, kv: Tensor, batch: Batch, masking: Masking) -> Tensor:
        step, shape = self.place(batch), self.layers[layer]
        places = step.places[shape.window]
        rows = self._pools[layer].view(-1, kv.shape[1])
        if not _has_decode_kernel(shape):
            out = self._attend_part(places.whole, rows, q, kv, shape, masking)
        elif not step.singles:
            out = self._attend_part(places.longer, rows, q, kv, shape, masking)
        else:
            out = q.new_empty(q.shape[0], q.shape[1], shape.v_head_dim)
            count = q.shape[0] - step.singles
            if count:
                out[:count] = self._attend_part(places.longer, rows, q[:count], kv[:count], shape, masking)
            self._attend_singles(out[count:], layer, q[count:], kv[count:], step, masking)
        # Only now: in a window's ring new tokens take the places of those that the first of them still see.
        rows.index_copy_(0, places.new, kv if places.kept is None else kv[places.kept])
        return out

    def attend_latents(
        self, layer: int, q: Tensor, key: Tensor, batch: Batch, weights: LatentWeights, masking: Masking
    ) -> Tensor:
        choice = self._latent_choice(layer, weights)
        if choice.name != "triton":
            return super().attend_latents(layer, q, key, batch, weights, masking)
        step, rows = self.place(batch), self._pools[layer].view(-1, key.shape[1])
        places, count = step.places[self.layers[layer].window], q.shape[0] - step.singles
        out = q.new_empty(*q.shape[:2], weights.value_up.shape[2])
        if count:
            known = self._known(places.longer, rows)
            known.index_copy_(0, places.longer.new, key[:count])
            out[:count] = self._prefill.latents(q[:count], known, places.longer.step, weights, masking.scale)
            rows.index_copy_(0, places.new[:count], key[:count])
        if step.singles:
            out[count:].flatten(1).copy_(
                self._attend_single_latents(layer, q[count:], key[count:], step, weights, masking)
            )
        return out

    def _latent_choice(self, layer: int, weights: LatentWeights) -> Choice:
        shape = self.layers[layer]
        key = (shape, weights.nope, weights.value_up.shape[2])
        if key not in self._choices:
            self._choices[key] = choose_latent(self.attention, shape, weights)
        return self._choices[key]

    def _attend_single_latents(
        self, layer: int, q: Tensor, key: Tensor, step: StepPlaces, weights: LatentWeights, masking: Masking
    ) -> Tensor:
        """One new token a sequence, normed and rotated already: [B, N * Dv]."""
        return latent_decode_attention(
            q.flatten(1),
            key,
            weights.key_up,
            weights.value_up,
            self.latents(layer),
            self.table(layer),
            step.slots,
            step.positions,
            self.latent_workspace(weights),
            scale=masking.scale,
            pdl=dependent_launch(self.device),
        )

    def _known(self, part: Part, rows: Tensor) -> Tensor:
        """A copy of what the pool holds of the spans, with places for their new tokens, [part.tokens, width]."""
        known = rows.new_empty(part.tokens, rows.shape[1])
        if part.step.continues:
            torch.index_select(rows, 0, part.rows, out=known)
        return known

    def _attend_part(
        self, part: Part, rows: Tensor, q: Tensor, kv: Tensor, shape: LayerShape, masking: Masking
    ) -> Tensor:
        """Spans of any length, over a copy of what the pool holds of them."""
        step, choice = part.step, self.choice(shape, masking)
        known = rows.new_empty(part.tokens + step.longest, rows.shape[1])
        if step.continues:
            torch.index_select(rows, 0, part.rows, out=known[: part.tokens])
        if choice.name == "flashinfer":
            known.index_copy_(0, part.new, kv)
        return self._prefill(choice, q, kv, known, step, shape, masking)

    def choice(self, shape: LayerShape, masking: Masking) -> Choice:
        """Which prefill backend serves such a layer, and why."""
        key = (shape, masking.window, masking.softcap, masking.sinks is None)
        if key not in self._choices:
            self._choices[key] = choose(self.attention, shape, masking, self.dtype)
        return self._choices[key]

    def _attend_singles(
        self, out: Tensor, layer: int, q: Tensor, kv: Tensor, step: StepPlaces, masking: Masking
    ) -> None:
        """One new token a sequence, whose heads are normed and rotated already."""
        (count, heads, size), kv_heads = q.shape, self.layers[layer].kv_heads
        fused_decode_attention(
            torch.cat((q.flatten(1), kv), 1),
            *self.pages(layer),
            self.table(layer),
            step.positions,
            None,
            self.workspace(heads, kv_heads, size),
            heads=heads,
            slots=step.slots,
            splits=self.splits(kv_heads, masking.window, count),
            scale=masking.scale,
            softcap=masking.softcap or None,
            sinks=masking.sinks,
            window=masking.window,
            out=out.view(count, -1),
        )

    def place(self, batch: Batch) -> StepPlaces:
        """A batch's places in the pools, found once for all layers; its pages enter the tables."""
        if self._step is None or self._step[0] is not batch:
            self._step = (batch, StepPlaces(batch, self.tables, self.page_tables))
        return self._step[1]


def _has_decode_kernel(shape: LayerShape) -> bool:
    return shape.head_dim == shape.v_head_dim and takes_head_size(shape.head_dim)
