"""Program: small calls of every operator that has kernels, for NVIDIA's memory checker.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python tests/ops/sanitize.py [--share I/N] [part of an operator's name ...]

The samples of the operators' table, then the mixtures in all ways that they are launched, each three times, since calls
that come again may be recorded and played (shardwise/ops/recorded.py). Several processes, each with its share, are done
sooner; a run without the checker before it leaves the kernels compiled. Without PyTorch's caching
every tensor is an allocation of its own, so that the checker knows its end. Prints each call before it is made: after
an error the CUDA context is gone and the name says whose it was.
"""

import argparse
import sys
import time

import torch
from mixture_calls import mixture_calls
from operator_samples import all_samples

import shardwise.ops as ops

ROUNDS = 3  # as it is written, recorded, played


def chosen(parts: list[str]) -> list:
    """The samples of operators that need a device and run here."""
    names = {info.qualified_name for info in ops.operators() if info.needs and info.availability()[0]}
    samples = [sample for sample in all_samples() if sample.qualified_name in names]
    return [sample for sample in samples if not parts or any(part in sample.op for part in parts)]


def calls(parts: list[str], device: str = "cuda"):
    """(label, call) of each."""

    def sampled(sample):
        torch.manual_seed(0)
        return sample.overload(*sample.build(device))

    yield from ((str(sample), lambda sample=sample: sampled(sample)) for sample in chosen(parts))
    torch.manual_seed(0)
    for label, call in mixture_calls(device):
        if not parts or any(part in label for part in parts):
            yield label, call


def main() -> int:
    """Call each; 1 when nothing was called."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", default="1/1", metavar="I/N", help="every Nth call, from the Ith")
    parser.add_argument("parts", nargs="*", help="parts of operators' names; without any, all are called")
    args = parser.parse_args()
    share, shares = map(int, args.share.split("/"))
    begin, count = time.monotonic(), 0
    for number, (label, call) in enumerate(calls(args.parts)):
        if number % shares == share - 1:
            print(f"[{time.monotonic() - begin:5.1f} s] {label}", flush=True)
            for _ in range(ROUNDS):
                call()
            torch.cuda.synchronize()
            count += 1
    print(f"[{time.monotonic() - begin:5.1f} s] {count} calls", flush=True)
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())
