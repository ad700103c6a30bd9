"""Options of a model: said once, and the same ones from Python, from the command line and in the engine."""

import argparse
import inspect
import os
from dataclasses import fields

import pytest

from shardwise import LLM
from shardwise.comm.rank import RankInfo
from shardwise.launch import model_config as configs
from shardwise.launch.cli import bench_generate, run
from shardwise.launch.model_config import ModelConfig, ModelOptions, model_config
from shardwise.parallel.engine import Engine

ALONE = RankInfo()
RANK = RankInfo(rank=1, world=4, local_rank=1, local_world=4, source="torchrun")
OPTIONS = list(ModelOptions.__annotations__)


def test_every_field_of_a_config_is_an_option_but_the_model_and_its_seed():
    assert [field.name for field in fields(ModelConfig)] == ["model", *OPTIONS, "random_seed"]


@pytest.mark.parametrize("verb", [run, bench_generate], ids=lambda verb: verb.__name__.rpartition(".")[2])
def test_both_verbs_have_every_option_with_the_same_default_but_lengths_that_they_know(verb):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    chosen = vars(parser.parse_args(["smollm2"]))
    plain: dict = {**ModelConfig(model="smollm2").options, "tp": None}
    del plain["request_tokens"]
    assert {name: chosen[name] for name in OPTIONS if name in chosen} == plain


def test_options_are_explained_where_the_user_looks():
    said = {word.strip(",") for line in (LLM.__doc__ or "").splitlines() for word in line[:25].split()}
    assert set(OPTIONS) <= said


def test_the_engine_takes_its_options_under_the_same_names():
    assert set(configs.ENGINE) <= inspect.signature(Engine).parameters.keys() & set(OPTIONS)


def test_an_unknown_option_is_a_type_error_that_lists_the_known_ones():
    with pytest.raises(TypeError, match="unknown option 'tensor_parallel_size'; legal: tp, attn_dp, moe_tp, ep, dtype"):
        LLM("smollm2", tensor_parallel_size=2)


@pytest.mark.parametrize("name", ["plan", "trace"])
def test_what_is_no_path_is_a_type_error(name):
    with pytest.raises(TypeError, match=f"{name} is 5, expected a path"):
        model_config(RANK, None, "smollm2", **{name: 5})


def test_a_folder_that_cannot_be_written_into_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(ValueError, match="^trace /.*: no permission to write there"):
        model_config(RANK, None, "smollm2", trace=str(tmp_path))


@pytest.mark.parametrize("model", [None, 5, ["smollm2"], b"smollm2"])
def test_what_names_no_model_is_a_type_error(model):
    with pytest.raises(TypeError, match="^model is .*: give a path or a name"):
        LLM(model)


def test_a_config_is_made_again_from_its_options():
    made = model_config(RANK, None, "smollm2", attn_dp=2, dtype="float32")
    assert (made.tp, made.attn_dp, made.world) == (2, 2, 4)
    assert model_config(RANK, None, "smollm2", **made.options) == made


@pytest.mark.parametrize(
    "info, options, text",
    [
        (ALONE, {"tp": "2"}, "tp '2': must be a whole number of at least 1"),
        (ALONE, {"tp": 2, "moe_tp": -1}, "moe_tp is -1"),
        (ALONE, {"plan": ""}, "plan is empty: name a file"),
        (RANK, {"attn_dp": None}, "attn_dp None: must be a whole number"),
        (ALONE, {"tp": 2, "ep": 3}, "world % ep = 2 % 3 = 2"),
        (RANK, {"tp": 2}, "tp 2 x attn_dp 1 needs 2 ranks, but torchrun started 4"),
        (RANK, {"attn_dp": 3}, "attn_dp 3 does not divide the 4 ranks that torchrun started"),
    ],
    ids=str,
)
def test_a_grid_that_cannot_be_is_refused(info, options, text):
    with pytest.raises(ValueError, match=text):
        model_config(info, None, "smollm2", **options)
