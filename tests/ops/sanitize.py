"""Program: small calls of every operator that has kernels, for NVIDIA's memory checker.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python tests/ops/sanitize.py [part of an operator's name ...]

Without PyTorch's caching every tensor is an allocation of its own, so that the checker knows its end. Prints each
operator before it runs: after an error the CUDA context is gone and the name says whose it was.
"""

import sys
import time

import torch
from operator_samples import all_samples

import shardwise.ops as ops

OURS, OTHERS = ("triton", "cuda"), ("flashinfer", "trtllm", "fla")


def chosen(parts: list[str]) -> list:
    """The samples of operators that need a device and run here: all of our own kernels, then one of each other."""
    infos = {info.qualified_name: info for info in ops.operators() if info.needs and info.availability()[0]}
    samples = [sample for sample in all_samples() if sample.qualified_name in infos]
    samples = [sample for sample in samples if not parts or any(part in sample.op for part in parts)]
    ours = [sample for sample in samples if infos[sample.qualified_name].backend in OURS]
    firsts = {}
    for sample in samples:
        if infos[sample.qualified_name].backend in OTHERS:
            firsts.setdefault(sample.op, sample)
    return ours + list(firsts.values())


def main(parts: list[str]) -> int:
    """Call each; 1 when nothing was called."""
    begin, samples = time.monotonic(), chosen(parts)
    for sample in samples:
        print(f"[{time.monotonic() - begin:5.1f} s] {sample}", flush=True)
        torch.manual_seed(0)
        sample.overload(*sample.build("cuda"))
        torch.cuda.synchronize()
    print(f"[{time.monotonic() - begin:5.1f} s] {len(samples)} samples called", flush=True)
    return 0 if samples else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
