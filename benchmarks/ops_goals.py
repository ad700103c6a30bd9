"""Device times that the goals of the operators' page ask for, on one GPU: an operator, its peers and copies in turn.

    python benchmarks/ops_goals.py [--only norms rope conv steps scan delta metadata] [--json FILE]

A row's variants are graphs of some calls each, replayed in turn; µs, the median of the replays. `copy` is the quicker
of PyTorch's `copy_` and an addition of zero that move the same bytes; `copy q and k` are two such additions, as there
are two tensors. Attention has its own program, `ops_attention.py`, and host times `ops_host_time.py`.
"""

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from ops_attention import Batch

from shardwise.launch.machine import machine_facts
from shardwise.ops.bench import cases, states
from shardwise.ops.bench.cases import Case
from shardwise.ops.bench.measure import alternating_microseconds

OPS = torch.ops.auto_deploy
SHAPES = {"Nemotron-H": states.NEMOTRON_H, "Bamba": states.BAMBA}
ROWS = (1, 8, 64, 512, 2048, 8192)


def row(what: str, calls: Mapping[str, Callable[[], object]], moved: int = 0, graph: int | None = None) -> dict:
    """Times of `calls` and, of so many bytes moved, of a copy; `graph` calls make a graph, few where they take long."""
    copies = _copies(moved) if moved else {}
    count = graph or (20 if moved < 3e8 else 4)
    times = alternating_microseconds({name: [call] * count for name, call in (calls | copies).items()}, repeats=11)
    if moved:
        times["copy"] = min(times.pop(name) for name in copies)
    return {"what": what, "bytes": moved, "us": times}


def _copies(moved: int) -> dict[str, Callable[[], object]]:
    source = torch.zeros(max(moved // 8, 4), dtype=torch.int32, device=cases.DEVICE)
    target = torch.empty_like(source)
    return {"copy_": lambda: target.copy_(source), "add zero": lambda: torch.add(source, 0, out=target)}


def by_operator(some: Iterator[Case]) -> dict[str, Case]:
    return {case.operator: case for case in some}


def norms() -> Iterator[dict]:
    """Against FlashInfer's functions, which have no gated norm."""
    for rows in ROWS:
        for width in (2880, 4096, 7168):
            made = by_operator(cases.norm_cases((rows,), (width,)))
            for name in ("rms_norm", "fused_add_rms_norm_inplace"):
                case = made[f"triton_{name}"]
                calls = {"triton": case.call, "flashinfer": case.peers["flashinfer"]}
                yield row(f"{name} {case.size}", calls, case.moved_bytes)
            case = made["triton_rmsnorm_gated"]
            yield row(f"rmsnorm_gated {case.size}", {"triton": case.call}, case.moved_bytes)


def rope() -> Iterator[dict]:
    """All three forms of ours, and FlashInfer's."""
    for tokens in (1, 64, 1024, 2048, 4096, 8192, 16384):
        made = by_operator(cases.rope_cases((tokens,)))
        for name in ("triton_rope_with_input_pos", "triton_rope_on_flattened_inputs"):
            yield row(f"{name} {made[name].size}", {"triton": made[name].call}, made[name].moved_bytes)
        case = made["triton_rope_on_interleaved_qk_inputs"]
        turned = torch.empty_like(case.args[0]), torch.empty_like(case.args[1])
        calls = {"triton": case.call, "flashinfer": case.peers["flashinfer"]}
        calls |= {
            "flashinfer_rope": made["flashinfer_rope"].call,
            "copy q and k": partial(_copy_both, case.args, turned),
        }
        yield row(f"{case.operator} {case.size}", calls, case.moved_bytes)


def _copy_both(given: tuple[torch.Tensor, ...], out: tuple[torch.Tensor, ...]) -> None:
    for source, target in zip(given, out, strict=False):
        torch.add(source, 0, out=target)


def conv() -> Iterator[dict]:
    """Decode steps, then prefill."""
    for batches, lengths in [((n,), ()) for n in (1, 8, 64, 128, 256, 512, 1024)] + [((), (n,)) for n in (1024, 8192)]:
        made = by_operator(states.conv_cases(batches, lengths))
        calls = {name.split("_", 1)[0]: case.call for name, case in made.items()}
        case = made["triton_cached_causal_conv1d"]
        yield row(f"conv {case.size}", calls, case.moved_bytes)


def steps() -> Iterator[dict]:
    """One state-space step of every sequence, beside FlashInfer's called directly."""
    for batch in (1, 8, 32, 64, 128, 256):
        for label, shape in SHAPES.items():
            made = list(states.ssm_decode_cases((batch,), {label: shape}))
            for ours, foreign in zip(made[::2], made[1::2], strict=True):
                calls = {"triton": ours.call, "flashinfer": ours.peers["flashinfer"]}
                yield row(f"ssm {ours.size}", calls | {"flashinfer_cached_ssm": foreign.call}, ours.moved_bytes)


def scan() -> Iterator[dict]:
    """State-space prefill, beside its form in separate kernels."""
    for length in (1024, 8192, 32768, 131072):
        case = next(states.ssm_prefill_cases((length,)))
        calls = {"triton": case.call, **({"separate": case.peers["separate"]} if length <= 8192 else {})}
        yield row(f"ssm {case.size}", calls, graph=2)


def delta() -> Iterator[dict]:
    """Delta rules, beside fla's kernels called directly."""
    for case in states.delta_cases((1024, 2048, 4096, 8192, 32768), (1, 64, 256)):
        yield row(f"{case.operator} {case.size}", {"operator": case.call, **case.peers}, graph=5)


def metadata() -> Iterator[dict]:
    """Device time, and whether a call waited for the device."""
    calls = {}
    for length in (64, 8192, 131072):
        made = by_operator(states.ssm_prefill_cases((length,)))
        calls[f"mamba_ssm_prepare_metadata 1 x {length}"] = made["mamba_ssm_prepare_metadata"].call
    for name, shape in (("128 of one token", Batch(128, 256, 1)), ("16 of 512", Batch(16, 512, 512))):
        inputs = shape.paged()[1]
        for family in ("attention", "mla"):
            operator = f"flashinfer_{family}_prepare_metadata"
            calls[f"{operator}, {name}"] = partial(getattr(OPS, operator), *inputs)
    for name, call in calls.items():
        yield row(name, {"operator": call}) | {"waits": _waits(call)}


def _waits(call: Callable[[], object]) -> bool:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


SECTIONS = {each.__name__: each for each in (norms, rope, conv, steps, scan, delta, metadata)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="kinds of rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions")
    args = parser.parse_args()
    torch.manual_seed(0)
    gc.collect()
    gc.freeze()  # a capture collects garbage, and need not walk over all of PyTorch each time
    rows = []
    for section in args.only:
        for one in SECTIONS[section]():
            rows.append({"section": section, **one})
            times = "  ".join(f"{name} {time:.4g}" for name, time in one["us"].items())
            rest = {key: value for key, value in one.items() if key not in ("what", "bytes", "us")}
            print(f"{one['what']:64} {times}", rest or "", flush=True)
            if args.json:
                args.json.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
