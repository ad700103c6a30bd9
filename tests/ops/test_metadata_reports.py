"""The word in which an operator's kernels report bad metadata."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from shardwise.ops import metadata_reports


def test_an_operator_has_one_word_though_threads_ask_for_it_at_once(monkeypatch):
    together = threading.Barrier(2)

    def zeros(*args, **options):
        together.wait(10)
        return torch.zeros(*args, **options)

    monkeypatch.setattr(metadata_reports, "torch", SimpleNamespace(zeros=zeros, int64=torch.int64, cuda=torch.cuda))
    monkeypatch.setattr(metadata_reports, "_reports", {})
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(metadata_reports.report_word, ["an operator of two threads"] * 2)
    assert one.data_ptr() == other.data_ptr()
