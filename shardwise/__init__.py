"""Shardwise: plan, load and run language models split over many ranks.

Public names are resolved on first use, so that `import shardwise` stays free of torch.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "LLM": "shardwise.launch.llm",
    "SamplingParams": "shardwise.parallel.sampler",
    "ParallelLayout": "shardwise.sharding.layout",
    "plan": "shardwise.sharding.plan",
}
__all__ = ["LLM", "ParallelLayout", "SamplingParams", "__version__", "plan"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'shardwise' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
