"""Model families: which file describes which published architecture."""

import hashlib
import importlib
import json
from dataclasses import replace

from shardwise.sharding.config import Config, ConfigError
from shardwise.sharding.spec import ModelSpec

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "llama",
    "Qwen3ForCausalLM": "llama",
}
"""Architecture name in config.json to module below this package; each has `build(config, name, architecture)`."""


class UnknownArchitecture(ConfigError):
    """No family file describes this architecture."""


def build(config: Config, name: str) -> ModelSpec:
    """The model that a config describes; UnknownArchitecture or ConfigError says what stands in the way."""
    listed = config.list("architectures", default=[], of=str)
    architecture = next((a for a in listed if a in ARCHITECTURES), None)
    if architecture is None:
        raise UnknownArchitecture(
            f"{config.source}: architectures is {listed}; known are {', '.join(sorted(ARCHITECTURES))}"
        )
    module = importlib.import_module(f"{__name__}.{ARCHITECTURES[architecture]}")
    return replace(module.build(config, name, architecture), fingerprint=_fingerprint(config))


def _fingerprint(config: Config) -> str:
    """SHA-256 of the config's fields in sorted order; `_meta` and other underscored keys are about the file."""
    fields = {key: value for key, value in config.data.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
