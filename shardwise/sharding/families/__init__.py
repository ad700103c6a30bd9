"""Model families: which file describes which published architecture."""

import hashlib
import importlib
import json
import re
from dataclasses import replace

from shardwise.sharding.config import Config, ConfigError
from shardwise.sharding.model import ModelSpec

FAMILIES: dict[str, tuple[str, ...]] = {
    "llama": (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Mistral3ForConditionalGeneration",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "MiMoForCausalLM",
        "MiniCPMForCausalLM",
    ),
    "smollm3": ("SmolLM3ForCausalLM",),
    "granite": ("GraniteForCausalLM",),
    "ernie": ("Ernie4_5ForCausalLM",),
    "glm4": ("Glm4ForCausalLM",),
    "hunyuan": ("HunYuanDenseV1ForCausalLM",),
    "llama4": ("Llama4ForConditionalGeneration",),
    "phi3": ("Phi3ForCausalLM",),
    "mixtral": ("MixtralForCausalLM",),
    "qwen_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
    ),
    "qwen_next": (
        "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
    ),
    "deepseek": (
        "DeepseekForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV32ForCausalLM",
        "KimiK25ForConditionalGeneration",
        "GlmMoeDsaForCausalLM",
        "Glm4MoeForCausalLM",
    ),
    "deepseek_v4": ("DeepseekV4ForCausalLM",),
    "kimi_linear": (
        "KimiLinearForCausalLM",
        "KimiK3ForConditionalGeneration",
    ),
    "gpt_oss": ("GptOssForCausalLM",),
    "minimax": (
        "MiniMaxM2ForCausalLM",
        "MiniMaxM3ForCausalLM",
        "MiniMaxM3SparseForConditionalGeneration",
    ),
    "nemotron_h": ("NemotronHForCausalLM",),
    "gemma": (
        "GemmaForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
    ),
    "gemma4": ("Gemma4ForConditionalGeneration",),
    "olmo": (
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "OlmoeForCausalLM",
    ),
    "hybrid": (
        "GraniteMoeHybridForCausalLM",
        "BambaForCausalLM",
        "FalconH1ForCausalLM",
    ),
    "mamba2": ("Mamba2ForCausalLM",),
    "mimo_v2": ("MiMoV2FlashForCausalLM",),
    "step": (
        "Step3p7FlashForCausalLM",
        "Step3p7ForConditionalGeneration",
    ),
    "plain_norm": (
        "CohereForCausalLM",
        "Cohere2ForCausalLM",
        "Starcoder2ForCausalLM",
    ),
    "internlm2": ("InternLM2ForCausalLM",),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPTBigCodeForCausalLM",
    ),
    "nas": ("DeciLMForCausalLM",),
}
"""Module below this package to the architecture names of config.json that it describes.

Each module has `build(config, name, architecture) -> ModelSpec`.
"""

ARCHITECTURES = {architecture: module for module, names in FAMILIES.items() for architecture in names}


class UnknownArchitecture(ConfigError):
    """No family file describes this architecture."""


def build(config: Config, name: str) -> ModelSpec:
    """The model that a config describes; UnknownArchitecture or ConfigError says what stands in the way."""
    listed = config.list("architectures", default=[], of=str)
    architecture = next((a for a in listed if a in ARCHITECTURES), None)
    if architecture is None:
        raise UnknownArchitecture(
            f"{config.source}: {_unknown(config, listed)}; "
            "beside its safetensors files the model plans from their headers"
        )
    module = importlib.import_module(f"{__name__}.{ARCHITECTURES[architecture]}")
    return replace(module.build(config, name, architecture), fingerprint=_fingerprint(config))


def _unknown(config: Config, listed: list[str]) -> str:
    """What the config says of its architecture, and what is near to it."""
    import difflib

    stems = {_stem(name): name for name in ARCHITECTURES}
    if listed:
        close = [stems[stem] for stem in difflib.get_close_matches(_stem(listed[0]), stems, n=3)]
        near = f"closest: {', '.join(close)}" if close else f"{len(ARCHITECTURES)} are known"
        return (
            f"architectures is {listed}, which no family describes ({near}); "
            'where it is of the same build as a known one, name that in "architectures"'
        )
    named = stems.get(_stem(str(config.raw("model_type"))))
    hint = f'; with this model_type add "architectures": ["{named}"]' if named else ""
    return f"names no architectures, as the config.json of a model does{hint}"


def _stem(name: str) -> str:
    """`qwen3moe` of Qwen3MoeForCausalLM and of the model type qwen3_moe."""
    return re.split("For[A-Z]|LMHead", name)[0].replace("_", "").lower()


def _fingerprint(config: Config) -> str:
    """SHA-256 of the config's fields in sorted order; `_meta` and other underscored keys are about the file."""
    fields = {key: value for key, value in config.data.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
