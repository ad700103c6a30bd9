"""The gated norm of a group that lies on several ranks, against plain float64 maths."""

import pytest
import torch
import torch.nn.functional as F

from shardwise.ops.normalization.gated_shared import norm_of_part, squares_of_part
from shardwise.ops.triton_support import interpreting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("after", [False, True])
def test_ranks_norm_their_parts_by_the_mean_of_all(after, dtype):
    torch.manual_seed(0)
    rows, widths, groups, number, eps = 3, (40, 24), 3, 1, 1e-5
    x, gate, weight = (torch.randn(*shape).to(DEVICE, dtype) for shape in ((rows, 64), (rows, 64), (64,)))
    opened, wide = F.silu(gate.double()), x.double()
    wide = wide if after else wide * opened
    expected = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps) * weight.double()
    expected = expected * opened if after else expected
    parts = list(zip(x.split(widths, 1), gate.split(widths, 1), weight.split(widths), strict=True))
    squares = sum(squares_of_part(x, gate, groups=groups, number=number, after=after) for x, gate, _ in parts)
    assert squares[:, [0, 2]].eq(0).all()
    got = [norm_of_part(*part, squares, number=number, size=64, eps=eps, after=after) for part in parts]
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(torch.cat(got, 1).double(), expected, **tolerance)


def test_rows_that_are_not_contiguous_are_refused():
    x = torch.ones(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="x and gate of one shape with contiguous rows"):
        squares_of_part(x, x.t(), groups=1, number=0, after=False)
