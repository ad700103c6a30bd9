"""Which tiles the state-space and convolution kernels should take on this GPU: device time of each choice.

    python benchmarks/ops_tiles.py [--only states outputs decode conv cuda]

The chosen values stand at the top of shardwise/ops/mamba/scan.py, conv_triton.py and conv_cuda.py; nothing is changed
by this program, it prints the choices by time, fastest first.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator

from shardwise.ops import bench_states, measure
from shardwise.ops.mamba import conv_cuda, conv_triton, scan

TOKENS = 8192
KERNELS = ("_launch_steps", "_launch_states", "_launch_outputs")


def alone(kernel: str, call: Callable[[], object]) -> float:
    """Time of one of the scan's three kernels: the other two are left out."""
    kept = {name: getattr(scan, name) for name in KERNELS}
    for name in KERNELS:
        if name != kernel:
            setattr(scan, name, lambda *_args, **_options: None)
    try:
        return measure.device_microseconds(call, calls=5)
    finally:
        for name, launcher in kept.items():
            setattr(scan, name, launcher)


def scan_rows(kernel: str, table: dict[str, int], choices: Iterable[tuple[int, ...]]) -> Iterator[tuple[float, str]]:
    """One kernel of the scan at every choice of its table's values."""
    case = next(bench_states.ssm_prefill_cases((TOKENS,)))
    chosen = dict(table)
    case.call()
    for values in choices:
        table.update(zip(table, values, strict=True))
        yield alone(kernel, case.call), str(table)
    table.update(chosen)


def decode_rows(batches: tuple[int, ...] = (1, 64, 256)) -> Iterator[tuple[float, str]]:
    """The decode step at several batch sizes."""
    chosen = dict(scan.DECODE)
    for case in bench_states.ssm_decode_cases(batches, {"Nemotron-H": bench_states.NEMOTRON_H}):
        if case.operator != "triton_cached_ssm":
            continue
        for elements, warps in itertools.product((512, 1024, 2048, 4096), (1, 2, 4, 8)):
            scan.DECODE.update(elements=elements, warps=warps)
            yield measure.device_microseconds(case.call), f"{case.size} {scan.DECODE}"
    scan.DECODE.update(chosen)


def conv_rows(module, names: tuple[str, ...], choices: Iterable[tuple[int, ...]]) -> Iterator[tuple[float, str]]:
    """A convolution's prefill with other module constants."""
    operator = f"{'cuda' if module is conv_cuda else 'triton'}_cached_causal_conv1d"
    case = next(case for case in bench_states.conv_cases((), (TOKENS,)) if case.operator == operator)
    chosen = [getattr(module, name) for name in names]
    for values in [*choices, chosen]:
        for name, value in zip(names, values, strict=True):
            setattr(module, name, value)
        yield measure.device_microseconds(case.call, calls=5), str(dict(zip(names, values, strict=True)))


SWEEPS: dict[str, Callable[[], Iterator[tuple[float, str]]]] = {
    "states": lambda: scan_rows(
        "_launch_states", scan.STATES, itertools.product((32, 64), (32, 64, 128), (32, 64), (4, 8), (2, 3))
    ),
    "outputs": lambda: scan_rows(
        "_launch_outputs", scan.OUTPUTS, itertools.product((64, 128), (32, 64), (4, 8), (2, 3))
    ),
    "decode": decode_rows,
    "conv": lambda: conv_rows(conv_triton, ("ROWS", "WIDTH"), itertools.product((16, 32, 64), (128, 256, 512))),
    "cuda": lambda: conv_rows(conv_cuda, ("ROWS",), [(8,), (16,), (32,), (64,), (128,)]),
}


def main() -> None:
    """Run the sweeps and print each, fastest first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    for name in parser.parse_args().only:
        print(name)
        for time, choice in sorted(SWEEPS[name]()):
            print(f"  {time:9.2f} µs  {choice}", flush=True)


if __name__ == "__main__":
    main()
