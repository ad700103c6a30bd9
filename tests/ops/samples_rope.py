"""Samples of the rotary embeddings; the oracles turn pairs as complex numbers in float64."""

import torch
from operator_samples import Sample

HALF = torch.bfloat16
LAYOUTS = ("bsnd", "bnsd", "sbnd", "snbd", "nbsd", "nsbd")


def angles(positions, size, device):
    """Rotation of every position, complex [positions, size/2]."""
    freqs = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    phase = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * freqs
    return torch.polar(torch.ones_like(phase), phase)


def turn(x, rotation, interleaved_in, interleaved_out):
    """x [..., D] times rotation [..., D/2], with either pairing on either side, in float64."""
    pairs = x.double().unflatten(-1, (-1, 2)) if interleaved_in else x.double().unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * rotation)
    return (turned if interleaved_out else turned.transpose(-1, -2)).flatten(-2)


def complex_of(cos, sin):
    half = cos.shape[-1] // 2
    return torch.complex(cos[..., :half].double(), sin[..., :half].double())


def doubled(rotation, dtype):
    """cos and sin with duplicated halves."""
    return [torch.cat((part, part), -1).to(dtype) for part in (rotation.real, rotation.imag)]


def explicit_args(dtype=torch.float32, dim=1, heads=(4, 2), size=16, arrange=lambda x: x):
    def build(device):
        rotation = angles(10, size, device)[torch.randint(0, 10, (2, 5), device=device)]
        shapes = [(2, n, 5, size) if dim == 1 else (2, 5, n, size) for n in heads]
        q, k = (arrange(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes)
        return q, k, *doubled(rotation, dtype), dim

    return build


def explicit(q, k, cos, sin, dim=1):
    rotation = complex_of(cos, sin).unsqueeze(dim)
    return turn(q, rotation, False, False), turn(k, rotation, False, False)


def deepseek(q, k, cos, sin, dim=1):
    rotation = complex_of(cos, sin).unsqueeze(dim)
    return turn(q, rotation, True, False), turn(k, rotation, True, False)


def complex_args(dim):
    def build(device):
        q, k = (torch.randn((2, 5, n, 12) if dim == 2 else (2, n, 5, 12), device=device) for n in (3, 1))
        return q, k, angles(5, 12, device).expand(2, 5, 6).to(torch.complex64), dim

    return build


def complex_product(q, k, freqs, dim=2):
    rotation = freqs.to(torch.complex128).unsqueeze(dim)
    return turn(q, rotation, True, True), turn(k, rotation, True, True)


def input_pos_args(layout, dtype=torch.float32, size=16, sizes=(3, 5, 6), arrange=lambda x: x):
    def build(device):
        extents = dict(zip("bsn", sizes, strict=True))
        x = arrange(torch.randn(*(extents[axis] for axis in layout[:3]), size, device=device, dtype=dtype))
        freqs = torch.view_as_real(angles(64, size, device)).float()
        return x, freqs, torch.randint(0, 50, (sizes[0],), dtype=torch.int32, device=device), layout

    return build


def input_pos(x, freqs, start, layout):
    order = [layout.index(axis) for axis in "bsn"] + [3]
    rows = start[:, None].long() + torch.arange(x.shape[order[1]], device=x.device)
    rotation = torch.view_as_complex(freqs.double())[rows][:, :, None]
    turned = turn(x.permute(order), rotation, False, False)
    return (turned.permute([order.index(dim) for dim in range(4)]),)


def flattened_args(lengths, heads=3, size=16, padding=0, dtype=torch.float32):
    def build(device):
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        starts = seq_lens.cumsum(0).to(torch.int32) - seq_lens
        x = torch.randn(sum(lengths) + padding, heads, size, device=device, dtype=dtype)
        freqs = torch.view_as_real(angles(80, size, device)).float()
        return x, freqs, torch.randint(0, 30, (len(lengths),), device=device), seq_lens, starts

    return build


def flattened(x, freqs, start, lengths, first):
    out, rotation = x.double().clone(), torch.view_as_complex(freqs.double())
    for position, length, row in zip(start.tolist(), lengths.tolist(), first.tolist(), strict=True):
        span = slice(row, row + length)
        if not length:
            continue
        out[span] = turn(x[span], rotation[position : position + length, None], False, False)
    return (out,)


def cached_args(dtype=torch.float32, heads=(4, 1), size=16, arrange=lambda x: x):
    def build(device):
        q, k = (arrange(torch.randn(2, 5, n, size, device=device, dtype=dtype)) for n in heads)
        return q, k, *doubled(angles(64, size, device), torch.float32), torch.randint(0, 64, (2, 5), device=device)

    return build


def cached(q, k, cos, sin, positions):
    rotation = complex_of(cos, sin)[positions][:, :, None]
    return turn(q, rotation, True, False), turn(k, rotation, True, False)


def flashinfer_args(neox, flat=False, dtype=HALF):
    def build(device):
        rotation = angles(128, 128, device)
        table = torch.cat((rotation.real, rotation.imag), -1).float()
        q, k = (torch.randn(2, 9, n, 128, device=device, dtype=dtype) for n in (8, 2))
        positions = torch.randint(0, 128, (2, 9), device=device)
        return (q[0], k[0], positions[0], table, neox) if flat else (q, k, positions, table, neox)

    return build


def tabled(q, k, positions, table, neox=True):
    half = table.shape[-1] // 2
    rotation = torch.complex(table[:, :half].double(), table[:, half:].double())[positions].unsqueeze(-2)
    return turn(q, rotation, not neox, not neox), turn(k, rotation, not neox, not neox)


def swapped(x):
    """The same values behind strides that are not contiguous."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_second(x):
    return x.repeat_interleave(2, -1)[..., ::2]


SAMPLES = [
    Sample(op="torch_rope_with_explicit_cos_sin", build=explicit_args(), oracle=explicit, traced=True),
    Sample(op="torch_rope_with_explicit_cos_sin", build=explicit_args(dim=2, size=10), oracle=explicit, note="bsnd"),
    Sample(op="torch_rope_with_explicit_cos_sin", build=explicit_args(arrange=swapped), oracle=explicit, note="view"),
    Sample(
        op="torch_rope_with_explicit_cos_sin", build=explicit_args(dtype=HALF), oracle=explicit, atol=0.06, note="bf16"
    ),
    Sample(op="torch_rope_with_qk_interleaving", build=explicit_args(), oracle=deepseek, traced=True),
    Sample(op="torch_rope_with_qk_interleaving", build=explicit_args(dim=2, size=6), oracle=deepseek, note="bsnd"),
    Sample(op="torch_rope_with_complex_freqs", build=complex_args(2), oracle=complex_product, traced=True),
    Sample(op="torch_rope_with_complex_freqs", build=complex_args(1), oracle=complex_product, note="bnsd"),
    *(
        Sample(
            op="triton_rope_with_input_pos",
            build=input_pos_args(layout),
            oracle=input_pos,
            traced=layout == "bsnd",
            note=layout,
        )
        for layout in LAYOUTS
    ),
    Sample(op="triton_rope_with_input_pos", build=input_pos_args("bsnd", size=80), oracle=input_pos, note="odd size"),
    Sample(
        op="triton_rope_with_input_pos", build=input_pos_args("bsnd", arrange=swapped), oracle=input_pos, note="view"
    ),
    Sample(
        op="triton_rope_with_input_pos",
        build=input_pos_args("bnsd", arrange=every_second),
        oracle=input_pos,
        note="strided channels",
    ),
    Sample(
        op="triton_rope_with_input_pos",
        build=input_pos_args("bsnd", dtype=HALF, size=128, sizes=(2, 3, 40)),
        oracle=input_pos,
        atol=2**-7,
        note="bf16",
    ),
    Sample(op="triton_rope_on_flattened_inputs", build=flattened_args((3, 0, 7, 1)), oracle=flattened, traced=True),
    Sample(
        op="triton_rope_on_flattened_inputs",
        build=flattened_args((4, 2), padding=3, heads=17, size=24),
        oracle=flattened,
        note="padding rows",
    ),
    Sample(
        op="triton_rope_on_flattened_inputs",
        build=flattened_args((0,) * 260 + (1,) * 20, heads=2, size=8),
        oracle=flattened,
        note="280 sequences",
    ),
    Sample(op="triton_rope_on_interleaved_qk_inputs", build=cached_args(), oracle=cached, traced=True),
    Sample(op="triton_rope_on_interleaved_qk_inputs", build=cached_args(arrange=swapped), oracle=cached, note="view"),
    Sample(
        op="triton_rope_on_interleaved_qk_inputs",
        build=cached_args(dtype=torch.float16, heads=(40, 3), size=96),
        oracle=cached,
        atol=2**-9,
        note="fp16",
    ),
    Sample(op="flashinfer_rope", build=flashinfer_args(True), oracle=tabled, atol=2**-6, traced=True),
    Sample(op="flashinfer_rope", build=flashinfer_args(False, flat=True), oracle=tabled, atol=2**-6, note="pairs"),
]
