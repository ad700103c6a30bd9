"""The decode kernel of gated delta layers is the operators' chain: norms, gates, step, gated norm."""

import pytest
import torch
import torch.nn.functional as F

from shardwise.ops.fla.decode import DeltaGates, DeltaHeads, delta_decode
from shardwise.ops.fla.delta import match_heads, step
from shardwise.ops.normalization.reference import torch_l2norm, torch_rmsnorm_gated
from shardwise.ops.registry import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.skipif(not TRITON.state[0], reason=TRITON.state[1])
SLOTS, BATCH = 5, 3


def problem(heads: DeltaHeads, dtype: torch.dtype):
    """Rows with others beside them in memory, states of more slots than sequences, and a layer's gates."""
    torch.manual_seed(0)
    width = heads.channels + heads.values * (heads.value_dim + 2)
    rows = torch.randn(BATCH, width + 3, device=DEVICE).to(dtype)[:, :width]
    states = torch.randn(SLOTS, heads.values, heads.key_dim, heads.value_dim, device=DEVICE)
    decay, bias = torch.randn(2, heads.values, device=DEVICE)
    return rows, states, DeltaGates(-decay.exp(), bias, torch.randn(heads.value_dim, device=DEVICE).to(dtype), 1e-5)


def by_operators(rows, states, heads: DeltaHeads, gates: DeltaGates):
    """Results [B, values V] and the states after them."""
    keys, values = heads.keys * heads.key_dim, heads.values * heads.value_dim
    q, k, v, z, beta, a = rows.double().split((keys, keys, values, values, heads.values, heads.values), 1)
    q, k = (torch_l2norm(x.unflatten(1, (heads.keys, -1))) for x in (q, k))
    v, z = (x.unflatten(1, (heads.values, -1)) for x in (v, z))
    g = gates.log_decay.double() * F.softplus(a + gates.dt_bias)
    out, states = step(*match_heads(q, k, v), v, beta.sigmoid(), g, heads.key_dim**-0.5, states)
    return torch_rmsnorm_gated(out, gates.norm.double(), z, gates.eps, heads.value_dim, True).flatten(1), states


@runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "heads", [DeltaHeads(2, 4, 16, 32), DeltaHeads(1, 3, 8, 12), DeltaHeads(3, 3, 128, 64)], ids=str
)
def test_a_step_equals_the_operators_in_its_slots_and_leaves_the_others_alone(heads, dtype):
    rows, states, gates = problem(heads, dtype)
    slots = torch.tensor([4, 0, 2], device=DEVICE, dtype=torch.int32)
    wanted, stepped = by_operators(rows, states[slots], heads, gates)
    expected = states.index_copy(0, slots.long(), stepped.float())
    out = delta_decode(rows, slots, states, heads, gates)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(out.double(), wanted.double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


@runs
def test_padding_gives_zeros_and_touches_no_state():
    heads = DeltaHeads(1, 2, 8, 16)
    rows, states, gates = problem(heads, torch.float32)
    before = states.clone()
    out = delta_decode(rows, torch.tensor([-1, 0, -1], device=DEVICE), states, heads, gates)
    assert out[[0, 2]].count_nonzero() == 0 and out[1].count_nonzero() > 0
    assert torch.equal(states[1:], before[1:]) and not torch.equal(states[0], before[0])


def test_states_of_other_heads_are_refused():
    heads = DeltaHeads(1, 2, 8, 16)
    rows, states, gates = problem(heads, torch.float32)
    slots = torch.arange(BATCH, device=DEVICE)
    with pytest.raises(ValueError, match=r"rows must be \[B, 84\].*states contiguous \(5, 2, 8, 16\)"):
        delta_decode(rows, slots, states.transpose(2, 3), heads, gates)
