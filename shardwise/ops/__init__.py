"""The `torch.ops.auto_deploy` operator library. Importing this package registers every operator.

Symbols used in shape comments throughout: B batch, S sequence, T tokens, H hidden, N heads, Nkv KV heads,
D head size (Dv of values), E experts, K top-k, I intermediate, R latent rank, W world, P SSM head size.

An operator `<backend>_<category>_<name>` lives in `<category>/<backend file>.py`: `reference.py` holds the
`torch_*` operators, the others are named after their backend. Beside the categories:

    registry                        the decorator; what is available, and why not
    triton_support, kernel_launch,  Triton where it is installed, launches whose host side is decided once, those with
    repeated                        their arguments kept
    recorded, tape, tape_writer,    calls of several kernels that are written down once a layout and then replayed
    foreign
    scratch, workspace              memory between the kernels of a call
    ptx, gluon_support,             what kernels are written with; CUDA C++ sources
    tensor_memory, nvcc
    metadata_reports, state_batch   bad metadata that only kernels see; sequences with states
    devices, dtypes, vector_access  what operators ask of their arguments
    bench/                          clocks and cases of `shardwise bench ops`
"""

import importlib
import pkgutil

from shardwise.ops.metadata_reports import raise_reports
from shardwise.ops.registry import CATEGORIES, OperatorUnavailable, OpInfo, operators

for _module in pkgutil.walk_packages(__path__, __name__ + "."):
    _place = _module.name.split(".")[2:]
    if len(_place) == 2 and _place[0] in CATEGORIES:  # shardwise.ops.<category>.<backend file>
        importlib.import_module(_module.name)

__all__ = ["OpInfo", "OperatorUnavailable", "operators", "raise_reports"]
