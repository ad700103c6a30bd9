"""A linear layer of a GPU whose weights stay 4-bit integers."""

from torch import Tensor

from shardwise.ops.linear.int4_many import int4_product, most_tokens
from shardwise.ops.quantization.int4_weight import Int4Weight
from shardwise.parallel.packed_linear import PackedLinear


class Int4Linear(PackedLinear[Int4Weight]):
    """A linear layer whose weight stays in 4 bits."""

    @property
    def most_packed(self) -> int:
        return most_tokens(self.weight)

    def packed_product(self, x: Tensor) -> Tensor:
        return int4_product(x, self.weight, bias=self.bias)
