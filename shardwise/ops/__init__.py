"""The `torch.ops.auto_deploy` operator library. Importing this package registers every operator.

Symbols used in shape comments throughout: B batch, S sequence, T tokens, H hidden, N heads, Nkv KV heads,
D head size (Dv of values), E experts, K top-k, I intermediate, R latent rank, W world, P SSM head size.

An operator `<backend>_<category>_<name>` lives in `<category>/<backend file>.py`: `reference.py` holds the
`torch_*` operators, the others are named after their backend. `registry.py` says what is available and why not.
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
