"""Integers of quantisers that stay packed on the CPU: products, memory, and where they are dequantised after all."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import LLAMA
from stored_forms import AwqForm, ByteForm, GptqForm, PackedIntForm, gptq, packed, whole_bytes
from test_dequantise import write
from test_fitting import ON_HOST

from shardwise.comm.rank import current_groups
from shardwise.parallel.block_groups import grouped_planes
from shardwise.parallel.block_linear import BlockLinear
from shardwise.parallel.engine import Engine
from shardwise.parallel.sampler import SamplingParams
from shardwise.parallel.weight_form import WeightForm
from shardwise.parallel.weights import Weights
from shardwise.sharding.checkpoint.resolve import open_checkpoint, random_checkpoint
from shardwise.sharding.plan import plan
from shardwise.testing import run_threads

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
FORMS = {
    "awq": AwqForm(AWQ, group=32),
    "gptq": GptqForm(gptq(group=64), group=64),
    "gptq 8 bit": GptqForm(gptq(8, group=32, sym=True), group=32, bits=8, symmetric=True),
    "gptq, one group": GptqForm(gptq(group=-1), group=-1),
    "int4": PackedIntForm(packed(group_size=32, symmetric=False), group=32, symmetric=False),
    "int8": ByteForm(whole_bytes("int", "int-quantized")),
}
SHAPE = LLAMA | {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "vocab_size": 40,
    "torch_dtype": "float32",
}


def layers(folder, role: str, tp: int) -> list[BlockLinear]:
    """Each rank's layer of a weight."""
    made = plan(folder, tp=tp)
    block = next(block for block in made.model.layers[0].blocks if f"{role}.weight" in block.roles)
    found = []
    for rank in range(tp):
        options = dict(dtype=torch.float32, device=torch.device("cpu"), native=True)
        weights = Weights(open_checkpoint(folder), made, rank, **options)
        planes = grouped_planes(weights, block, role, layer=0)
        assert planes is not None, (role, rank)
        found.append(BlockLinear(planes=planes))
    return found


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_products_of_all_ranks_are_those_of_the_weight(tmp_path, form, tp):
    plain = write(tmp_path, form, SHAPE | {"intermediate_size": 320 if form.group in (32, 64) else 384})
    for role, tokens in (("up", 5), ("down", 80)):
        weight = next(weight for module, weight in plain.items() if module.endswith(f".{role}_proj"))
        x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0))
        ranks = layers(tmp_path, role, tp)
        if role == "up":
            got = torch.cat([layer(x) for layer in ranks], 1)
        else:
            sizes = [layer.planes[0].packed.shape[1] * 2 for layer in ranks]
            got = torch.stack([layer(part) for layer, part in zip(ranks, x.split(sizes, 1), strict=True)]).sum(0)
        expected = x.double() @ weight.double().T
        assert (got - expected).norm() / expected.norm() < 1e-2  # bfloat16 inputs, scales and zeros


def run(path, tp: int):
    """(plan, each rank's tokens, stats, and whether it takes single tokens by `token_step`), with native weights."""
    made = plan(path, tp=tp)

    def rank():
        engine = Engine(random_checkpoint(path), made, current_groups(), weights="native")
        tokens = [c.token_ids for c in engine.generate([[5, 17, 3]], SamplingParams(max_new_tokens=4, ignore_eos=True))]
        return tokens, engine.stats(), engine.runner.token_step is not None

    return made, run_threads(tp, rank, layout=made.layout)


@pytest.mark.parametrize("name", ["awq", "gptq 8 bit", "int8"])
def test_a_model_of_groups_runs_and_takes_what_was_foretold(tmp_path, name):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | {"intermediate_size": 384, "quantization_config": FORMS[name].section}))
    for tp in (1, 3):
        made, ranks = run(path, tp)
        assert all(tokens == ranks[0][0] for tokens, _, _ in ranks)
        assert all(
            steps == (FORMS[name].bits == 4) for _, _, steps in ranks
        )  # one plane: single tokens by `token_step`
        for number, (_, stats, _) in enumerate(ranks):
            assert stats.weights == "as stored where a layer takes it, asked for by name"
            held = replace(ON_HOST, dtype=torch.float32, form=WeightForm(True, False, "")).need(made, number).weights
            assert 0.9 * stats.weight_bytes < held < 1.02 * stats.weight_bytes


def test_outputs_that_a_model_reorders_stay_packed(tmp_path):
    """GLM-4's rotation takes pairs of neighbours, and its layers halves of a head."""
    fields = {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "partial_rotary_factor": 0.5}
    path, kept = tmp_path / "config.json", {"attention_bias": True, "quantization_config": AWQ}
    path.write_text(json.dumps(SHAPE | fields | kept))
    made = plan(path, tp=2)

    def rank():
        engines = [
            Engine(random_checkpoint(path), made, current_groups(), weights=f) for f in ("native", "dequantised")
        ]
        x = torch.randn(3, 192, generator=torch.Generator().manual_seed(0))
        packed, plain = (engine.decoder.layers[0].mixer.qkv for engine in engines)
        return type(packed), packed(x), plain(x)

    for kind, got, expected in run_threads(2, rank, layout=made.layout):
        assert kind is BlockLinear and (got - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize(
    "section",
    [gptq(group=32, desc_act=True), AWQ | {"group_size": 16}, gptq(2, group=32)],
    ids=["act-order", "short groups", "2 bits"],
)
def test_other_forms_are_dequantised_and_say_so(tmp_path, section):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE | {"quantization_config": section}))
    _, ((_, stats, _),) = run(path, 1)
    assert stats.weights.startswith("as stored where a layer takes it, asked for by name; ")
    assert "MiB of them dequantised from" in stats.weights


@pytest.mark.parametrize("index", ["shuffled", "one group for all"])
def test_an_order_that_the_config_denies_is_refused(tmp_path, index):
    form = GptqForm(gptq(group=32), group=32, act_order=True)
    write(tmp_path, form, SHAPE)
    if index == "one group for all":
        file = tmp_path / "model.safetensors"
        stored = {n: t.zero_() if n.endswith("g_idx") else t for n, t in load_file(file).items()}
        save_file(stored, file)
    with pytest.raises(ValueError, match="rows are not in the order of their groups, .* set desc_act to true"):
        layers(tmp_path, "up", 1)
