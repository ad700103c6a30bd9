"""One stored tensor with logical axes, or one pattern of them. Frozen, compares by value, free of torch.

Roles (`q.weight`, `gate.scale`, ...) name a tensor inside its block and are the same for all families; names are those
of a Hugging Face checkpoint (the GGUF reader shows its tensors so).
"""

from dataclasses import dataclass, replace
from math import prod

from shardwise.sharding.axes import Dim, LogicalAxis
from shardwise.sharding.checkpoint.header import stored_bytes
from shardwise.sharding.packing import Packing


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor, or one pattern of them: `{layer}` and `{expert}` in the name stand for numbers."""

    role: str
    name: str
    dims: tuple[Dim, ...]
    dtype: str
    """Storage type as the file format names it: `BF16`, `F8_E4M3`, `U8`, GGUF's `Q4_1`."""
    values: int = 1
    """Logical parameters in one stored element: 8 for int32 words of 4-bit weights, 0 for scales, zeros and indices."""
    row_parallel_bias: bool = False
    """The bias of a row-parallel matmul: every rank holds it, exactly one adds it."""
    optional: bool = False
    """Some checkpoints of this format leave it out; binding to headers then drops it."""
    experts: LogicalAxis | None = None
    """Set where the name has `{expert}`: one such tensor an expert of this axis."""
    packing: Packing | None = None
    """Set where a stored element holds several values."""
    transposed: bool = False
    """A weight [.., in, out], or what belongs to one."""

    @property
    def value_dims(self) -> tuple[Dim, ...]:
        """The dims of a weight's values, whatever elements they are stored in."""
        dims = self.dims[:-1] if self.packing and self.packing.blocks else self.dims
        return tuple(replace(dim, per=1) for dim in dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape, as stored."""
        return tuple(dim.length for dim in self.dims)

    @property
    def parameters(self) -> int:
        """Logical parameters of one tensor of this pattern."""
        return prod(self.shape) * self.values

    @property
    def nbytes(self) -> int:
        """Bytes of one whole tensor of this pattern."""
        return stored_bytes(self.shape, self.dtype)

    def path(self, layer: int | None = None, expert: int | None = None) -> str:
        """The name with the numbers that are given filled in."""
        name = self.name if layer is None else self.name.replace("{layer}", str(layer))
        return name if expert is None else name.replace("{expert}", str(expert))
