"""How a logical weight is stored: the tensors of each quantisation format, on the weight's own axes.

A format turns one linear weight, given by its output dims and its input dim, into stored tensors. Packed words, block
scales and zeros are the same dims at a coarser grain (`Dim.coarse`), so they are cut where the weight is cut.
"""

from dataclasses import dataclass

from shardwise.sharding.axes import Dim, LogicalAxis
from shardwise.sharding.spec import TensorSpec

DTYPES = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3fn": "F8_E4M3",
}
"""Storage types by the names that configs use."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight before it is stored: `lead` dims (the expert dim of stacked weights), then out x in."""

    role: str
    name: str
    """Module name, without `.weight`."""
    out: Dim
    inner: Dim
    dtype: str
    lead: tuple[Dim, ...] = ()
    experts: LogicalAxis | None = None
    transposed: bool = False
    """Stored as [in, out]."""
    suffix: str = ".weight"

    def tensor(
        self, part: str, suffix: str, out: Dim | None, inner: Dim | None, dtype: str, values: int = 0
    ) -> TensorSpec:
        """One stored tensor; a dim given as None is absent."""
        pair = (inner, out) if self.transposed else (out, inner)
        dims = self.lead + tuple(d for d in pair if d is not None)
        return TensorSpec(f"{self.role}.{part}", self.name + suffix, dims, dtype, values, experts=self.experts)

    def weight(self, dtype: str, values: int = 1, suffix: str | None = None) -> TensorSpec:
        return self.tensor("weight", self.suffix if suffix is None else suffix, self.out, self.inner, dtype, values)


class Format:
    """Plain storage in the weight's own type; subclasses are the quantised formats."""

    name = "none"

    def store(self, linear: Linear) -> tuple[TensorSpec, ...]:
        return (linear.weight(linear.dtype),)


PLAIN = Format()


def bias(linear: Linear, row_parallel: bool) -> TensorSpec:
    """The bias of a linear layer; that of a row-parallel one is whole on every rank and added once."""
    name = linear.name + (".bias" if linear.suffix == ".weight" else "_bias")
    return TensorSpec(
        f"{linear.role}.bias",
        name,
        (*linear.lead, linear.out),
        linear.dtype,
        row_parallel_bias=row_parallel,
        experts=linear.experts,
    )
