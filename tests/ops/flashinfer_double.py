"""A stand-in for the parts of FlashInfer that the attention operators call, with its parameter names, on the CPU.

It reads pages the way FlashInfer's kernels do, from what `plan` was given, and computes with the plain PyTorch
operator. It proves what our side hands over (pages, orders, lengths, scales, plans), not FlashInfer.
"""

import sys
import types

import torch

from shardwise.ops.attention.reference import torch_attention


def _lengths(indptr, last_page_len, page_size):
    return [max(0, (int(b) - int(a) - 1) * page_size + int(last))
            for a, b, last in zip(indptr[:-1], indptr[1:], last_page_len, strict=True)]  # fmt: skip


def _causal(q, k, v, scale, causal):
    """q [S, N, D], k [L, Nkv, D], v [L, Nkv, Dv], any dtypes -> float32 [S, N, Dv]."""
    parts = [x.float().transpose(0, 1)[None] for x in (q, k, v)]
    return torch_attention(*parts, is_causal=causal, scale=scale)[0].transpose(0, 1)


def _both(paged_kv_cache):
    """Keys and values [pages, Nkv, page_size, D] of one tensor or of two."""
    return paged_kv_cache if isinstance(paged_kv_cache, tuple) else paged_kv_cache.unbind(1)


class _Paged:
    causal = True

    def _set(self, indptr, indices, last_page_len, page_size, scale, seq_lens, dtypes):
        assert _lengths(indptr, last_page_len, page_size) == seq_lens.tolist()
        assert all(x.dtype == torch.int32 for x in (indptr, indices, last_page_len, seq_lens))
        self.indptr, self.indices, self.last_page_len = indptr, indices, last_page_len
        self.page_size, self.scale, self.dtypes = page_size, scale, dtypes

    def run(self, q, paged_kv_cache, *, out, enable_pdl, k_scale=1.0, v_scale=1.0):
        keys, values = _both(paged_kv_cache)
        assert (q.dtype, keys.dtype) == self.dtypes and keys.shape[2] == self.page_size
        lengths = _lengths(self.indptr, self.last_page_len, self.page_size)
        for i, length in enumerate(lengths):
            rows = self.indices[self.indptr[i] : self.indptr[i + 1]].long()
            k, v = (half[rows].float().transpose(1, 2).flatten(0, 1)[:length] for half in (keys, values))
            part = slice(int(self.qo_indptr[i]), int(self.qo_indptr[i + 1]))
            out[part] = (_causal(q[part], k, v, self.scale * k_scale, self.causal) * v_scale).to(out.dtype)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    causal = False

    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False,
        paged_kv_indptr_buffer=None, paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend="auto",
    ):  # fmt: skip
        assert kv_layout == "HND" and use_tensor_cores
        self.buffers = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert use_cuda_graph == all(x is not None for x in self.buffers)
        self.graph = use_cuda_graph

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, q_data_type,
        kv_data_type, sm_scale, seq_lens,
    ):  # fmt: skip
        self._set(indptr, indices, last_page_len, page_size, sm_scale, seq_lens, (q_data_type, kv_data_type))
        self.qo_indptr = range(len(last_page_len) + 1)
        if self.graph:
            assert len(last_page_len) == len(self.buffers[2]) and len(indices) <= len(self.buffers[1])
            for buffer, value in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
                buffer[: len(value)].copy_(value)
            self.indptr, self.indices, self.last_page_len = self.buffers


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", *, backend="auto"):
        assert kv_layout == "HND"

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, *, causal, sm_scale, q_data_type, kv_data_type, seq_lens,
    ):  # fmt: skip
        assert causal and len(qo_indptr) == len(paged_kv_indptr) and int(qo_indptr[0]) == 0
        self.qo_indptr = qo_indptr
        self._set(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, sm_scale, seq_lens,
                  (q_data_type, kv_data_type))  # fmt: skip


class BatchPrefillWithRaggedKVCacheWrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", *, backend="auto"):
        assert kv_layout == "NHD"

    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, *, causal,
        use_fp16_qk_reduction, sm_scale, q_data_type,
    ):  # fmt: skip
        assert causal and not use_fp16_qk_reduction
        self.qo_indptr, self.kv_indptr, self.scale = qo_indptr.tolist(), kv_indptr.tolist(), sm_scale
        self.sizes = (head_dim_qk, head_dim_vo)

    def run(self, q, k, v, *, out, enable_pdl):
        assert (q.shape[2], v.shape[2]) == self.sizes
        for i in range(len(self.qo_indptr) - 1):
            mine, keys = (slice(x[i], x[i + 1]) for x in (self.qo_indptr, self.kv_indptr))
            out[mine] = _causal(q[mine], k[keys], v[keys], self.scale, True).to(out.dtype)
        return out


class BatchMLAPagedAttentionWrapper:
    def __init__(
        self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None,
        kv_len_arr=None, backend="auto",
    ):  # fmt: skip
        self.buffers = (qo_indptr, kv_indptr, kv_indices, kv_len_arr) if use_cuda_graph else None

    def plan(
        self, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal,
        sm_scale, q_data_type, kv_data_type,
    ):  # fmt: skip
        self.planned = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        if self.buffers is not None:
            for buffer, value in zip(self.buffers, self.planned, strict=True):
                buffer[: len(value)].copy_(value)
            self.planned = self.buffers
        self.page_size, self.causal, self.scale = page_size, causal, sm_scale

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache):
        assert q_nope.is_contiguous() and q_pe.is_contiguous() and ckv_cache.shape[1] == self.page_size
        qo_indptr, indptr, indices, lengths = self.planned
        out = torch.empty_like(q_nope)
        for i, length in enumerate(lengths.tolist()):
            rows, part = indices[indptr[i] : indptr[i + 1]].long(), slice(int(qo_indptr[i]), int(qo_indptr[i + 1]))
            latent, rotated = (x[rows].flatten(0, 1)[:length, None] for x in (ckv_cache, kpe_cache))
            query, key = torch.cat((q_nope[part], q_pe[part]), dim=-1), torch.cat((latent, rotated), dim=-1)
            out[part] = _causal(query, key, latent, self.scale, self.causal).to(out.dtype)
        return out


def _write(cache, entries, batch_indices, positions, kv_indices, kv_indptr):
    """entries [T, ...] into cache [pages, page_size, ...]."""
    assert batch_indices.dtype == positions.dtype == kv_indices.dtype == kv_indptr.dtype == torch.int32
    for entry, sequence, position in zip(entries, batch_indices.tolist(), positions.tolist(), strict=True):
        page = int(kv_indices[int(kv_indptr[sequence]) + position // cache.shape[1]])
        cache[page, position % cache.shape[1]] = entry


def append_paged_kv_cache(
    append_key, append_value, batch_indices, positions, paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len,
    kv_layout="NHD",
):  # fmt: skip
    assert kv_layout == "HND" and append_key.dtype == append_value.dtype
    for half, entries in zip(_both(paged_kv_cache), (append_key, append_value), strict=True):
        assert half.dtype == entries.dtype
        _write(half.transpose(1, 2), entries, batch_indices, positions, kv_indices, kv_indptr)


def append_paged_mla_kv_cache(
    append_ckv, append_kpe, batch_indices, positions, ckv_cache, kpe_cache, kv_indices, kv_indptr, kv_last_page_len
):
    for cache, entries in ((ckv_cache, append_ckv), (kpe_cache, append_kpe)):
        assert entries.stride(-1) == 1 and entries.dtype == cache.dtype
        _write(cache, entries, batch_indices, positions, kv_indices, kv_indptr)


def install(monkeypatch) -> None:
    """Let `import flashinfer` find this stand-in."""
    package, page, mla = (types.ModuleType(name) for name in ("flashinfer", "flashinfer.page", "flashinfer.mla"))
    for wrapper in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper,
                    BatchPrefillWithRaggedKVCacheWrapper):  # fmt: skip
        setattr(package, wrapper.__name__, wrapper)
    page.append_paged_kv_cache, page.append_paged_mla_kv_cache = append_paged_kv_cache, append_paged_mla_kv_cache
    mla.BatchMLAPagedAttentionWrapper = BatchMLAPagedAttentionWrapper
    for module in (package, page, mla):
        monkeypatch.setitem(sys.modules, module.__name__, module)
