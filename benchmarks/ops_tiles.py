"""Which tiles the state-space, convolution and delta-rule kernels should take on this GPU: device time of each choice.

    python benchmarks/ops_tiles.py [--only states outputs decode prefill cuda tokens step] [--warm]

The chosen values stand at the top of shardwise/ops/mamba/scan.py, conv_triton.py and conv_cuda.py, of
shardwise/ops/fla/step.py, and in block_rows of shardwise/ops/mamba/conv.py; nothing is changed by this program. It
prints every choice as it is measured and each sweep's fastest at its end. --warm only compiles, so that several of
these can do so side by side before one measures.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

from shardwise.ops.bench import measure, states
from shardwise.ops.fla import fla, step
from shardwise.ops.kernel_launch import Form
from shardwise.ops.mamba import conv_cuda, conv_triton, scan
from shardwise.ops.mamba import triton as ssm_triton
from shardwise.ops.registry import FLA

TOKENS = 8192
KERNELS = ("_launch_steps", "_launch_states", "_launch_outputs")
Rows = Iterator[tuple[float, str]]
warm = False


def time_of(call: Callable[[], object], calls: int = 5) -> float:
    """Microseconds of one call; infinite where the choice cannot be compiled or launched. 0 when only compiling."""
    for module in (conv_cuda, conv_triton, ssm_triton, fla):  # launches of other tables
        module.STEPS.clear()
    try:
        if warm:
            call()
            return 0.0
        return measure.device_microseconds(call, calls=calls, repeats=7)
    except Exception as error:  # a tile that asks too much of the device ends its own row only
        print(f"  {type(error).__name__}: {str(error)[:120]}", flush=True)
        return float("inf")


class Absent(Form):
    """A kernel that is not launched."""

    def __init__(self) -> None:
        pass

    def form_for(self, *_args, **_options) -> Form:
        return self

    def __call__(self, *_args) -> None:
        pass

    def bound(self, *_args) -> tuple:
        return (lambda *_args: None, None, ()), ()


def alone(kernel: str, call: Callable[[], object]) -> float:
    """Time of one of the scan's three kernels: the other two are left out."""
    kept = {name: getattr(scan, name) for name in KERNELS}
    for name in KERNELS:
        if name != kernel:
            setattr(scan, name, Absent())
    try:
        return time_of(call)
    finally:
        for name, launcher in kept.items():
            setattr(scan, name, launcher)


def scan_rows(kernel: str, table: dict[str, int], choices: Iterable[tuple[int, ...]]) -> Rows:
    """One kernel of the scan at every choice of its table's values."""
    case = next(states.ssm_prefill_cases((TOKENS,)))
    chosen = dict(table)
    case.call()
    for values in choices:
        table.update(zip(table, values, strict=True))
        yield alone(kernel, case.call), str(table)
    table.update(chosen)


def step_rows(cases: Iterable, operator: str, module, choices: Iterable[tuple[int, int]]) -> Rows:
    """A decode step at several batch sizes: numbers of a state that a program holds, and its warps."""
    chosen = dict(module.FEW), dict(module.MANY)
    for case in cases:
        if case.operator != operator:
            continue
        for elements, warps in choices:
            for table in (module.FEW, module.MANY):
                table.update(elements=elements, warps=warps)
            yield time_of(case.call, 20), f"{case.size} {module.FEW}"
    module.FEW.update(chosen[0])
    module.MANY.update(chosen[1])


def delta_rows() -> Rows:
    """The delta rule's decode step, where fla is installed."""
    if not FLA.state[0]:
        return
    choices = itertools.product((2048, 4096, 8192), (1, 2, 4, 8))
    cases = states.delta_cases((), (1, 64, 256))
    yield from step_rows(cases, "fla_cached_gated_delta_rule", step, list(choices))


def conv_prefill_rows(module, choices: Iterable[tuple[int, int, int]]) -> Rows:
    """A convolution's prefill: rows of a block, and for Triton warps and rows ahead."""
    name = f"{'cuda' if module is conv_cuda else 'triton'}_cached_causal_conv1d"
    case = next(case for case in states.conv_cases((), (TOKENS,)) if case.operator == name)
    rows_of, table = module.block_rows, dict(conv_triton.PREFILL)
    for rows, warps, ahead in choices:
        module.block_rows = lambda _one, rows=rows: rows
        conv_triton.PREFILL.update(warps=warps, ahead=ahead)
        yield time_of(case.call), f"rows {rows} {conv_triton.PREFILL if module is conv_triton else ''}"
    module.block_rows = rows_of
    conv_triton.PREFILL.update(table)


def conv_decode_rows() -> Rows:
    """The convolutions' decode steps: tokens of a program (Triton), thread blocks of a multiprocessor (CUDA)."""
    for case in states.conv_cases((1, 32, 64, 128, 256, 1024), ()):
        if case.operator.startswith("triton"):
            for together in (1, 2, 4):
                with mock.patch.multiple(conv_triton, MANY_TOKENS=0, TOGETHER=together):
                    yield time_of(case.call, 20), f"{case.operator} {case.size} {together} tokens together"
        else:
            for resident in (1, 2, 3, 4, 8):
                with mock.patch.object(conv_cuda, "RESIDENT", resident):
                    yield time_of(case.call, 20), f"{case.operator} {case.size} {resident} blocks a multiprocessor"


def ssm_decode_rows() -> Rows:
    """The state-space decode step."""
    cases = states.ssm_decode_cases((1, 8, 64, 256), {"Nemotron-H": states.NEMOTRON_H})
    choices = itertools.product((1024, 2048, 4096), (1, 2, 4))
    yield from step_rows(cases, "triton_cached_ssm", scan, list(choices))


SWEEPS: dict[str, Callable[[], Rows]] = {
    "states": lambda: scan_rows(
        "_launch_states",
        scan.STATES,
        [
            *((64, 64, T, 4, stages) for T in (64, 128) for stages in (2, 3, 4)),
            *((64, 128, 64, warps, stages) for warps in (4, 8) for stages in (2, 3)),
            (64, 128, 128, 8, 2),
            *((32, N, 64, 4, 3) for N in (64, 128)),
        ],
    ),
    "outputs": lambda: scan_rows(
        "_launch_outputs",
        scan.OUTPUTS,
        [
            *((64, 1, warps, stages) for warps in (4, 8) for stages in (2, 1, 3)),
            *((128, heads, 8, stages) for heads in (1, 2) for stages in (2, 1)),
        ],
    ),
    "decode": ssm_decode_rows,
    "prefill": lambda: conv_prefill_rows(
        conv_triton, ((rows, warps, ahead) for warps in (4, 1, 2) for ahead in (4, 2, 8) for rows in (64, 128, 256))
    ),
    "cuda": lambda: conv_prefill_rows(conv_cuda, ((rows, 4, 4) for rows in (16, 32, 64, 128, 256))),
    "tokens": conv_decode_rows,
    "step": delta_rows,
}


def main() -> None:
    """Run the sweeps, each printed as it goes and its fastest at the end."""
    global warm
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--warm", action="store_true", help="compile only")
    args = parser.parse_args()
    warm = args.warm
    for name in args.only:
        print(name)
        rows = []
        for time, choice in SWEEPS[name]():
            rows.append((time, choice))
            print(f"  {time:9.2f} µs  {choice}", flush=True)
        if rows and not warm:
            print("  fastest of all:", *(f"{time:.2f} µs {choice}" for time, choice in sorted(rows)[:3]), sep="\n    ")


if __name__ == "__main__":
    main()
