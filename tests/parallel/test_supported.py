"""What the runtime says it cannot run: no option of a block goes unnoticed."""

import json
from dataclasses import dataclass, fields, replace

import pytest

from shardwise.launch.cli import main
from shardwise.parallel import assemble, layers, rotary, routing, supported
from shardwise.parallel.supported import UnsupportedModel, check_supported
from shardwise.sharding import spec
from shardwise.sharding.families import ARCHITECTURES
from shardwise.sharding.model import Layer, ModelSpec
from shardwise.sharding.source import load_model

CHECKED = {
    Layer: "mixers feed_forward mixer_norm mixer_post_norm feed_forward_norm feed_forward_post_norm parallel_residual "
    "residual_multiplier others",
    ModelSpec: "name architecture hidden vocab embedding layers final_norm head dtype quantization max_positions "
    "bos_token_id eos_token_ids extras others fingerprint notes",
}
"""What `supported.py` and the decoder were written for; a new field belongs in both, and then here."""
MHA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(MHA))
    return load_model(file)


@pytest.mark.parametrize("kind", CHECKED, ids=lambda kind: kind.__name__)
def test_layers_and_models_have_no_field_that_nobody_looks_at(kind):
    assert {field.name for field in fields(kind)} == set(CHECKED[kind].split())


def test_the_tables_name_fields_that_there_are():
    for table in (supported._EVERY, supported._SOME):
        for kind, names in table.items():
            assert set(names) <= {field.name for field in fields(kind)}, kind


def test_the_tables_are_those_of_the_layers():
    assert (tuple(assemble.MIXERS), tuple(assemble.FEED_FORWARDS)) == (supported.MIXERS, supported.FEED_FORWARDS)
    assert tuple(rotary._KINDS) == tuple(supported.ROPES)
    assert tuple(layers._ACTIVATIONS) == supported.ACTIVATIONS
    assert tuple(routing._SCORES) == supported.SCORES


def test_a_field_that_a_family_adds_is_refused_until_it_is_implemented(model, monkeypatch):
    @dataclass(frozen=True, kw_only=True)
    class Attention(spec.Attention):
        twist: float = 0.0

    monkeypatch.setattr(supported, "MIXERS", (Attention,))
    monkeypatch.setitem(supported._EVERY, Attention, supported._EVERY[spec.Attention])
    monkeypatch.setitem(supported._SOME, Attention, supported._SOME[spec.Attention])
    old = model.layers[0].mixers[0]
    values = {field.name: getattr(old, field.name) for field in fields(old)}

    def with_twist(twist: float) -> ModelSpec:
        layer = replace(model.layers[0], mixers=(Attention(**values, twist=twist),))
        return replace(model, layers=(layer,))

    check_supported(with_twist(0.0))
    with pytest.raises(UnsupportedModel, match="layer 0: Attention.twist = 0.5; the runtime supports 0.0"):
        check_supported(with_twist(0.5))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"k_is_v": True}, "Attention.k_is_v = True; the runtime supports False"),
        ({"qk_norm": "rows"}, "Attention.qk_norm = 'rows'; the runtime supports None, head, all_heads"),
        ({"rope": spec.Rope(theta=1.0, dim=16, kind="spiral")}, "Rope.kind = 'spiral'; .* default, linear, dynamic"),
        ({"rope": spec.Rope(theta=1.0, dim=16, kind="linear")}, "rope scaling linear without factor, which its config"),
    ],
    ids=str,
)
def test_an_option_without_an_implementation_is_named_with_what_has_one(model, change, text):
    layer = replace(model.layers[0], mixers=(replace(model.layers[0].mixers[0], **change),))
    with pytest.raises(UnsupportedModel, match=f"LlamaForCausalLM, layer 1: {text}"):
        check_supported(replace(model, layers=(model.layers[0], layer)))


@pytest.mark.parametrize(
    ("kind", "field"), [("longrope", ("short_factor", (1.0,) * 8)), ("yarn", ("llama_4_scaling_beta", 0.1))]
)
def test_what_changes_beyond_the_original_context_is_run_up_to_there(model, kind, field):
    rope = spec.Rope(theta=1.0, dim=16, kind=kind, scaling=(field, ("original_max_position_embeddings", 64)))
    layer = replace(model.layers[0], mixers=(replace(model.layers[0].mixers[0], rope=rope),))
    assert (supported.context(model), model.max_positions) == (0, 0)
    assert supported.context(replace(model, max_positions=4096, layers=(layer,))) == 64
    assert supported.context(replace(model, layers=(layer,))) == 64


def test_an_activation_without_an_implementation_is_refused(model):
    layer = replace(model.layers[0], feed_forward=(replace(model.layers[0].feed_forward[0], activation="softsign"),))
    with pytest.raises(UnsupportedModel, match="DenseMlp.activation = 'softsign'; the runtime supports silu, swish"):
        check_supported(replace(model, layers=(layer,)))


def test_a_model_without_a_layer_here_is_one_sentence_before_any_rank_starts(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("shardwise.launch.llm.ParentExecutor", None)
    (tmp_path / "config.json").write_text(json.dumps(MHA | {"architectures": ["GPT2LMHeadModel"]}))
    for words in (["run", str(tmp_path)], ["bench", "generate", "--shape", str(tmp_path), "--dummy-weights"]):
        assert "GPT2LMHeadModel" in ARCHITECTURES and main(words) == 1
        err = capfd.readouterr().err
        assert err.startswith("shardwise: error: GPT2LMHeadModel, ") and err.count("\n") == 1


def test_a_bias_behind_latent_experts_is_refused():
    nemotron = {
        "architectures": ["NemotronHForCausalLM"],
        "hidden_size": 48,
        "vocab_size": 96,
        "num_attention_heads": 4,
        "layers_block_type": ["moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "moe_latent_size": 16,
    }
    check_supported(load_model(nemotron))
    with pytest.raises(UnsupportedModel, match="layer 0: a bias behind latent experts"):
        check_supported(load_model(nemotron | {"mlp_bias": True}))
