import torch

from shardwise.parallel.transfer import ALIGNMENT, to_device


def test_tensors_travel_together_and_stay_what_they_were():
    tensors = [
        torch.tensor([1, -2, 3]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([[7, 8, 9]], dtype=torch.int32),
        torch.tensor([1.5], dtype=torch.float16),
    ]
    moved = to_device(tensors, torch.device("cpu"))
    for tensor, got in zip(tensors, moved, strict=True):
        assert got.dtype == tensor.dtype and got.shape == tensor.shape and torch.equal(got, tensor)
    assert len({got.untyped_storage().data_ptr() for got in moved}) == 1
    assert all(got.storage_offset() * got.element_size() % ALIGNMENT == 0 for got in moved)
