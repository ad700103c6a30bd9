"""Paged metadata of a `Step`, with pages in shuffled order."""

from dataclasses import dataclass

import torch
from oracles_attention import Step

PAGE_SIZE = 16


@dataclass
class Paged:
    """The metadata that the paged operators take; tensors named *_host are on the CPU."""

    batch_info_host: torch.Tensor
    cu_seqlen_host: torch.Tensor
    cu_num_pages: torch.Tensor
    cu_num_pages_host: torch.Tensor
    cache_loc: torch.Tensor
    last_page_len: torch.Tensor
    last_page_len_host: torch.Tensor
    seq_len_with_cache_host: torch.Tensor

    @classmethod
    def of(cls, step: Step, device: str = "cpu", page_size: int = PAGE_SIZE) -> "Paged":
        info, seq_len, input_pos, _, cu_seqlen = step.metadata()
        total = (seq_len + input_pos).to(torch.int32)
        pages = -(-total // page_size)
        starts = torch.cat((pages.new_zeros(1), pages.cumsum(0))).to(torch.int32)
        order = torch.randperm(int(starts[-1]), generator=torch.Generator().manual_seed(3)).to(torch.int32)
        last = torch.where(total > 0, (total - 1) % page_size + 1, 0).to(torch.int32)
        return cls(info, cu_seqlen, starts.to(device), starts, order.to(device), last.to(device), last, total)

    def arguments(self):
        return (self.batch_info_host, self.cu_seqlen_host, self.cu_num_pages, self.cu_num_pages_host, self.cache_loc,
                self.last_page_len, self.last_page_len_host, self.seq_len_with_cache_host)  # fmt: skip

    def metadata_inputs(self, step: Step, device: str):
        """position_ids, batch_info_host, cu_seqlen, seq_len_with_cache of the operator that prepares a step."""
        positions = torch.zeros(1, step.tokens, dtype=torch.int64, device=device)
        return positions, self.batch_info_host, self.cu_seqlen_host.to(device), self.seq_len_with_cache_host.to(device)

    def rows(self, sequence: int) -> torch.Tensor:
        """Page ids of one sequence."""
        return self.cache_loc[self.cu_num_pages_host[sequence] : self.cu_num_pages_host[sequence + 1]].long()

    def gather(self, cache: torch.Tensor, sequence: int) -> torch.Tensor:
        """cache [pages, page_size, ...] -> the sequence's entries [tokens in the cache, ...]."""
        return cache[self.rows(sequence)].flatten(0, 1)[: int(self.seq_len_with_cache_host[sequence])]

    def scatter(self, cache: torch.Tensor, sequence: int, entries: torch.Tensor) -> None:
        """Write entries [L, ...] to the sequence's first L positions of cache [pages, page_size, ...]."""
        rows, size = self.rows(sequence), cache.shape[1]
        position = torch.arange(len(entries), device=cache.device)
        cache[rows[position // size], position % size] = entries
