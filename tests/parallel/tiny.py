"""Tiny random checkpoints written by Transformers, and the tokens that Transformers generates from them."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from shardwise.comm.rank import current_groups
from shardwise.parallel.engine import Engine, SamplingParams
from shardwise.sharding.layout import ParallelLayout
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

VOCAB = 259
"""Not a multiple of 2, 3 or 4, so that every cut of the vocabulary is uneven."""
PROMPTS = [[5, 17, 200, 3, 9, 44, 81], [7], [250, 1, 1, 30, 12, 99, 6, 6, 13, 77, 21, 140]]
NEW_TOKENS = 12

COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


GPU_KERNELS = ("fla", "causal_conv1d", "mamba_ssm")


@contextmanager
def plain_transformers() -> Iterator[None]:
    """Models are imported without the packages whose kernels, where it finds them, Transformers calls for any tensor,
    also for those on a CPU, which they cannot read."""
    held = {name: sys.modules.pop(name, None) for name in GPU_KERNELS}
    sys.modules.update(dict.fromkeys(GPU_KERNELS))  # an import of None fails
    try:
        yield
    finally:
        for name, module in held.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def write(folder: Path, model_type: str, *, seed: int = 0, vision: dict | None = None, **fields) -> Path:
    """A checkpoint folder of random weights, large enough that its logits differ clearly.

    `vision`: of a model that also sees, the config of the part for it; `fields` are the text's.
    """
    torch.manual_seed(seed)
    fields = {**COMMON, "head_dim": 16, **fields}
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    config = AutoConfig.for_model(model_type, **(dict(text_config=fields, vision_config=vision) if vision else fields))
    with plain_transformers():
        model = kind.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {f"<extra{i}>": i for i in range(len(letters), VOCAB)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))


@torch.inference_mode()
def expected_tokens(folder: Path, prompts=PROMPTS, count: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy tokens of Transformers, each prompt by itself; refuses a checkpoint whose argmax hangs on rounding."""
    with plain_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            best = model(torch.tensor([ids])).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] > 1e-3, "two tokens are as likely: choose another seed"
            ids.append(int(best.indices[0]))
        answers.append(ids[len(prompt) :])
    return answers


def generate(folder: Path, layout: ParallelLayout, prompts=PROMPTS, **params) -> list[list]:
    """Completions of every rank, in rank order."""
    made = plan(folder, layout)

    def rank():
        engine = Engine(folder, made, current_groups())
        return engine.generate(prompts, SamplingParams(**{"max_new_tokens": NEW_TOKENS, **params}))

    return run_threads(layout.world, rank, layout=layout)
