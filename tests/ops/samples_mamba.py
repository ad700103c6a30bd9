"""Samples of the state-space operators and the causal convolutions."""

import mamba_oracle
import torch
from mamba_oracle import Batch
from operator_samples import Sample

import shardwise.ops  # noqa: F401  (registers the operators)

HALF = torch.bfloat16
LIMIT = [0.01, 0.8]
MIXED = Batch(prefill=(5, 0, 11, 1), decode=3, slots=(4, 6, 0, 2, 5, -1, 1), resumes=(True, False, False, True))
PADDED = Batch(prefill=(9, 3), decode=1, slots=(-1, 1, 0), resumes=(False, True), padding=2, entries=6)
DECODE = Batch(prefill=(), decode=4, slots=(2, -1, 0, 6), resumes=())
LONG = Batch(prefill=(70, 3, 33), decode=0, slots=(0, 3, 5), resumes=(True, True, False))
PREFILL = Batch(prefill=(37,), decode=0, slots=(3,), resumes=(True,))
BORDERS = Batch(prefill=(16, 1, 17, 2, 0, 48, 3), decode=2, slots=(0, 3, 5, 6, 2, 4, -1, 1, -1), resumes=(True,) * 7)
# Decode batches whose tokens share readings of the weights by two and by four.
MANY, MOST = (
    Batch(prefill=(), decode=n, slots=tuple(-1 if i % 7 == 3 else i for i in range(n)), resumes=()) for n in (131, 259)
)


def ssm_inputs(tokens, heads, groups, size, states, dtype, device):
    def draw(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    x, B, C = draw(1, tokens, heads, size), draw(1, tokens, groups, states), draw(1, tokens, groups, states)
    A = -torch.rand(heads, device=device) * 2
    return x, A, B, C, torch.randn(heads, device=device), draw(1, tokens, heads), torch.randn(heads, device=device)


def ssm_args(tokens, chunk, heads=4, groups=2, size=6, states=5, batch=2):
    def build(device):
        x, A, B, C, D, dt, bias = ssm_inputs(batch * tokens, heads, groups, size, states, torch.float32, device)
        x, B, C, dt = (t.view(batch, tokens, *t.shape[2:]) for t in (x, B, C, dt))
        return x, A, B, C, D, dt, bias, LIMIT, chunk

    return build


def ssm(x, A, B, C, D, dt, bias, limit, chunk):
    rows = [
        mamba_oracle.recurrence(x[i], A, B[i], C[i], D, dt[i], bias, limit)[0] if x.shape[1] else x[i].double()
        for i in range(x.shape[0])
    ]
    return (torch.stack(rows),)


def cached_ssm_args(op, batch, heads=4, groups=2, size=16, states=16, chunk=4, dtype=torch.float32, cache=None):
    def build(device):
        inputs = ssm_inputs(batch.tokens, heads, groups, size, states, dtype, device)
        if not batch.prefill:
            inputs = tuple(t.transpose(0, 1).contiguous() if t.dim() > 2 else t for t in inputs)
        info, seq_len, bounds, slots, resumes = batch.tensors(device)
        state = torch.randn(7, heads, size, states, device=device).to(cache or dtype)
        if op == "torch_cached_ssm":
            return *inputs, info, seq_len, bounds, slots, resumes, state, LIMIT, chunk
        positions = torch.zeros(inputs[0].shape[:2], dtype=torch.int64, device=device)
        pieces = torch.ops.auto_deploy.mamba_ssm_prepare_metadata(positions, info, seq_len, bounds, chunk)
        return *inputs, info, bounds, slots, resumes, *pieces, state, LIMIT, chunk

    return build


def cached_ssm(batch):
    def oracle(x, A, B, C, D, dt, bias, *rest):
        state, limit = rest[-3].double().cpu(), rest[-2]
        A, D, bias = A.cpu(), D.cpu(), bias.cpu()
        flat = [t.flatten(0, 1).cpu() for t in (x, B, C, dt)]
        out = torch.zeros(flat[0].shape, dtype=torch.float64)
        for rows, slot, resumes in batch.spans():
            if slot < 0 or rows.start == rows.stop:
                continue
            xs, Bs, Cs, dts = (t[rows] for t in flat)
            start = state[slot] if resumes else None
            out[rows], state[slot] = mamba_oracle.recurrence(xs, A, Bs, Cs, D, dts, bias, limit, start)
        return out.view(x.shape), state

    return oracle


def metadata_args(batch, chunk):
    def build(device):
        info, seq_len, bounds, _, _ = batch.tensors(device)
        shape = (1, batch.tokens) if batch.prefill else (batch.tokens, 1)
        return torch.zeros(shape, dtype=torch.int64, device=device), info, seq_len, bounds, chunk

    return build


def metadata(batch):
    def oracle(positions, info, seq_len, bounds, chunk):
        pieces, owner = [], []
        for number, (rows, _, _) in enumerate(list(batch.spans())[: len(batch.prefill)]):
            cuts = {t for t in range(rows.start, rows.stop) if t == rows.start or t % chunk == 0}
            pieces += [(cut // chunk, cut % chunk) for cut in sorted(cuts)]
            owner += [number] * (rows.stop - rows.start)
        table = torch.tensor(pieces, dtype=torch.int32).view(-1, 2)
        if positions.is_cuda and owner:
            longest = min(len(owner), -(-len(owner) // chunk) + len(batch.prefill) - 1)
            table = torch.nn.functional.pad(table, (0, 0, 0, longest - len(table)), value=-1)
        return table[:, 0], table[:, 1], torch.tensor(owner, dtype=torch.int32)[None]

    return oracle


def conv_args(groups=6, out=6, K=4, tokens=9):
    def build(device):
        x, weight = torch.randn(2, tokens, 6, device=device), torch.randn(out, 6 // groups, K, device=device)
        return x, weight, torch.randn(out, device=device), 1, K - 1, 1, groups

    return build


def conv(x, weight, bias, stride, padding, dilation, groups):
    padded = torch.nn.functional.pad(x.double().transpose(1, 2), (padding, 0))
    return (torch.nn.functional.conv1d(padded, weight.double(), bias.double(), groups=groups).transpose(1, 2),)


def cached_conv_args(op, batch, channels=24, K=4, dtype=torch.float32, activation="silu", bias=True, flat=False):
    def build(device):
        shape = (1, batch.tokens, channels) if batch.prefill else (batch.tokens, 1, channels)
        x, weight = torch.randn(*shape, device=device).to(dtype), torch.randn(channels, 1, K, device=device).to(dtype)
        offset = torch.randn(channels, device=device).to(dtype) if bias else None
        info, seq_len, bounds, slots, resumes = batch.tensors(device)
        length = K if op == "torch_cached_causal_conv1d" else K - 1
        state = torch.randn(max(7, len(batch.slots)), channels, length, device=device).to(dtype)
        tail = (state, 1, K - 1, 1, channels, "zeros")
        weight = weight[:, 0] if flat else weight
        if op == "torch_cached_causal_conv1d":
            return x, weight, offset, info, seq_len, bounds, slots, resumes, *tail
        if op == "cuda_cached_causal_conv1d":
            return x, weight, offset, info, bounds, slots, resumes, *tail, activation
        return x, weight, offset, info, seq_len, bounds, slots, resumes, *tail, activation

    return build


def cached_conv(batch, in_place):
    def oracle(x, weight, bias, *rest):
        state = rest[-7] if in_place else rest[-6]
        activation = rest[-1] if in_place else None
        state, weight = state.double().cpu(), weight.flatten(1).cpu()
        bias, K = None if bias is None else bias.cpu(), weight.shape[1]
        flat = x.flatten(0, 1).double().cpu()
        out = flat.clone() if in_place else torch.zeros_like(flat)
        for rows, slot, resumes in batch.spans():
            if slot < 0 or rows.start == rows.stop:
                continue
            past = state[slot] if resumes else torch.zeros_like(state[slot])
            last = past[:, past.shape[1] - K + 1 :]
            out[rows], _ = mamba_oracle.convolve(flat[rows], weight, bias, last, activation)
            state[slot] = torch.cat((past, flat[rows].T), 1)[:, -state.shape[2] :]
        return out.view(x.shape), state

    return oracle


BATCHES = {"mixed": MIXED, "padded": PADDED, "decode": DECODE, "prefill": PREFILL}
SAMPLES = [
    Sample(op="torch_ssm", build=ssm_args(23, 8), oracle=ssm, atol=1e-4, traced=True),
    Sample(op="torch_ssm", build=ssm_args(3, 64, heads=3, groups=3), oracle=ssm, atol=1e-4, note="one chunk"),
    Sample(op="torch_ssm", build=ssm_args(0, 8), oracle=ssm, note="empty"),
    *(
        Sample(
            op=op,
            build=cached_ssm_args(op, batch),
            oracle=cached_ssm(batch),
            atol=1e-4,
            traced=name == "mixed",
            note=name,
        )
        for op in ("torch_cached_ssm", "triton_cached_ssm")
        for name, batch in BATCHES.items()
    ),
    *(
        Sample(
            op="triton_cached_ssm",
            build=cached_ssm_args("triton_cached_ssm", batch, 3, 1, 20, 24, 16, torch.float16, torch.float32),
            oracle=cached_ssm(batch),
            atol=0.02,
            note=f"{name} fp16, uneven sizes",
        )
        for name, batch in {"mixed": MIXED, "prefill": PREFILL}.items()
    ),
    *(
        Sample(
            op="flashinfer_cached_ssm",
            build=cached_ssm_args("flashinfer_cached_ssm", batch, 8, 2, 64, 128, 16, HALF, torch.float32),
            oracle=cached_ssm(batch),
            atol=0.2,
            traced=name == "mixed",
            note=name,
        )
        for name, batch in BATCHES.items()
    ),
    *(
        Sample(
            op="mamba_ssm_prepare_metadata",
            build=metadata_args(batch, 4),
            oracle=metadata(batch),
            bound=True,
            traced=name == "mixed",
            note=name,
        )
        for name, batch in BATCHES.items()
    ),
    Sample(op="torch_causal_conv1d", build=conv_args(), oracle=conv, traced=True),
    Sample(op="torch_causal_conv1d", build=conv_args(groups=1, out=4, K=3), oracle=conv, note="dense"),
    *(
        Sample(
            op="torch_cached_causal_conv1d",
            build=cached_conv_args("torch_cached_causal_conv1d", batch),
            oracle=cached_conv(batch, False),
            traced=name == "mixed",
            note=name,
        )
        for name, batch in BATCHES.items()
    ),
    *(
        Sample(
            op=op,
            build=cached_conv_args(op, batch),
            oracle=cached_conv(batch, True),
            traced=name == "mixed",
            note=name,
        )
        for op in ("triton_cached_causal_conv1d", "cuda_cached_causal_conv1d")
        for name, batch in BATCHES.items()
    ),
    *(
        Sample(
            op=op,
            build=cached_conv_args(op, batch, channels, K, dtype, None, K < 4, True),
            oracle=cached_conv(batch, True),
            atol=atol,
            note=f"{name} {channels} K={K} {dtype}",
        )
        for op in ("triton_cached_causal_conv1d", "cuda_cached_causal_conv1d")
        for name, batch, channels, K, dtype, atol in (
            ("mixed", MIXED, 40, 2, torch.float32, 1e-5),
            ("prefill", PREFILL, 40, 3, torch.float16, 2**-9),
            ("decode", DECODE, 40, 4, HALF, 2**-6),
            ("decode", DECODE, 33, 4, HALF, 2**-6),
            ("long", LONG, 40, 4, HALF, 2**-6),
            ("borders", BORDERS, 300, 4, torch.float32, 1e-5),
        )
    ),
    *(
        Sample(
            op="cuda_cached_causal_conv1d",
            build=cached_conv_args("cuda_cached_causal_conv1d", batch, 264, 4, torch.float16, None),
            oracle=cached_conv(batch, True),
            atol=2**-9,
            note=f"{note} tokens",
        )
        for note, batch in (("many", MANY), ("most", MOST))
    ),
]
