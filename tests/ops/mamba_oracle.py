"""Float64 oracles of the state-space operators: the plain recurrence, one token at a time."""

import torch


def softplus(x):
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def recurrence(x, A, B, C, D, dt, dt_bias, limit, state=None):
    """x [s, H, P], B, C [s, G, N], dt [s, H], state [H, P, N] -> y [s, H, P], final state; float64."""
    x, A, B, C, D, dt, dt_bias = (t.double() for t in (x, A, B, C, D, dt, dt_bias))
    heads, size = x.shape[1:]
    state = x.new_zeros(heads, size, B.shape[-1]) if state is None else state.double()
    group = torch.arange(heads) // (heads // B.shape[1])
    steps = softplus(dt + dt_bias).clamp(*limit)
    rows = []
    for t in range(x.shape[0]):
        state = state * torch.exp(steps[t] * A)[:, None, None]
        state = state + (steps[t][:, None] * x[t])[..., None] * B[t][group][:, None]
        rows.append((state * C[t][group][:, None]).sum(-1) + D[:, None] * x[t])
    return torch.stack(rows) if rows else x, state


def convolve(x, weight, bias, past, activation=None):
    """Depthwise: x [s, C], weight [C, K], past [C, K - 1] -> y [s, C], last K - 1 inputs; float64."""
    joined = torch.cat((past.double(), x.double().T), 1)
    y = (joined.unfold(1, weight.shape[1], 1) * weight.double()[:, None]).sum(-1)
    y = y if bias is None else y + bias.double()[:, None]
    y = y * torch.sigmoid(y) if activation == "silu" else y
    return y.T, joined[:, joined.shape[1] - weight.shape[1] + 1 :]


class Batch:
    """A mixed batch and the metadata tensors that describe it."""

    def __init__(self, prefill, decode, slots, resumes, padding=0, entries=3):
        """prefill: lengths; decode: how many sequences; slots and resumes: of all sequences, in order."""
        self.prefill, self.decode, self.slots = prefill, decode, slots
        self.resumes = list(resumes) + [True] * decode
        self.tokens = sum(prefill) + decode + padding
        self.lengths = list(prefill) + [1] * decode
        counts = [len(prefill), sum(prefill), decode]
        self.info = counts if entries == 3 else [0, 0, len(prefill), sum(prefill), decode, decode]

    def spans(self):
        """(rows, slot, resumes) of every sequence."""
        start = 0
        for length, slot, resumes in zip(self.lengths, self.slots, self.resumes, strict=True):
            yield slice(start, start + length), slot, resumes
            start += length

    def tensors(self, device):
        """batch_info_host, seq_len, cu_seqlen, slot_idx, use_initial_states."""
        seq_len = torch.tensor(self.lengths, dtype=torch.int32)
        bounds = torch.cat((torch.zeros(1, dtype=torch.int32), seq_len.cumsum(0).to(torch.int32)))
        rest = seq_len, bounds, torch.tensor(self.slots), torch.tensor(self.resumes)
        return torch.tensor(self.info, dtype=torch.int32), *(tensor.to(device) for tensor in rest)
