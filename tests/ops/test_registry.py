"""The registry: what a definition must bring, what a caller is told, and the `shardwise ops` verb."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardwise.launch.cli import main
from shardwise.ops import operators
from shardwise.ops import registry as module
from shardwise.ops.registry import BACKENDS, CATEGORIES, Need, OperatorUnavailable, operator


def define(name, folder="rope", **options):
    """Register a small operator as if its module lay in a category folder."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    function.__name__, function.__module__ = name, f"shardwise.ops.{folder}.reference"
    options = {"fake": torch.empty_like, "namespace": "shardwise_test", **options}
    return operator(**options)(function)


@pytest.fixture(autouse=True)
def only_for_this_test(monkeypatch):
    monkeypatch.setattr(module, "_OPERATORS", dict(module._OPERATORS))
    libraries = {}
    monkeypatch.setattr(module, "_LIBRARIES", libraries)
    yield
    for library in libraries.values():
        library._destroy()


def absent(name="device"):
    return Need(name, lambda: (False, f"no {name} here"))


def test_an_operator_is_found_in_its_category_and_backend():
    define("torch_one")
    info = next(info for info in operators() if info.name == "torch_one")
    assert (info.category, info.backend, info.qualified_name) == ("rope", "torch", "shardwise_test::torch_one")
    assert torch.ops.shardwise_test.torch_one(torch.zeros(2)).tolist() == [1, 1]
    assert info.availability() == (True, "plain PyTorch")


def test_the_decorated_name_stays_the_plain_function():
    assert define("torch_two")(torch.zeros(1)).item() == 1


def test_an_absent_need_is_named_together_with_the_operator_to_use():
    define("triton_three", needs=(absent(),), instead="torch_three")
    with pytest.raises(OperatorUnavailable) as caught:
        torch.ops.shardwise_test.triton_three(torch.zeros(1))
    assert str(caught.value) == (
        "shardwise_test::triton_three cannot run here: no device here; call shardwise_test::torch_three instead"
    )


def test_needs_are_probed_at_the_first_call_and_once():
    probes = []
    define("triton_four", needs=(Need("thing", lambda: (probes.append(1) is None, "present"), on_cpu=lambda: True),))
    assert not probes
    for _ in range(3):
        torch.ops.shardwise_test.triton_four(torch.zeros(1))
    assert len(probes) == 1


def test_cpu_tensors_of_a_device_operator_are_refused_in_words():
    define("flashinfer_five", needs=(Need("card", lambda: (True, "a card")),))
    with pytest.raises(OperatorUnavailable, match="its tensors are on the CPU"):
        torch.ops.shardwise_test.flashinfer_five(torch.zeros(1))


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("torch_linear_simple", (torch.zeros(2, 3), None, None), "torch_linear_simple: weight is None; legal: a "),
        ("gather_tokens", (torch.zeros(1, 2, 3), torch.arange(2), None), "gather_tokens: batch_info_host is None"),
        (
            "torch_swiglu_mlp",
            (torch.tensor(0.0), *[torch.zeros(2, 2)] * 3, *[None] * 3),
            "torch_swiglu_mlp: a tensor has too few",
        ),
        ("torch_dist_all_reduce", (torch.zeros(2), "FASTEST"), "torch_dist_all_reduce: unknown strategy 'FASTEST'"),
    ],
)
def test_errors_name_the_operator_and_a_missing_tensor(name, args, words):
    with pytest.raises(ValueError, match=words):
        getattr(torch.ops.auto_deploy, name)(*args)


def test_a_product_of_tensors_on_different_devices_is_refused_in_words():
    info = next(info for info in operators() if info.name == "torch_linear_simple")
    args = torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), None
    error = module._named(info, args, RuntimeError("Expected all tensors to be on the same device"))
    assert isinstance(error, ValueError)
    assert str(error) == (
        "torch_linear_simple: tensors lie on cpu, meta; legal: one device for all but those named *_host"
    )


def test_an_error_of_another_kind_is_left_alone(monkeypatch):
    def fails(*_args, **_options):
        raise RuntimeError("out of paper")

    monkeypatch.setattr(torch.Tensor, "topk", fails)
    with pytest.raises(RuntimeError, match="^out of paper"):
        torch.ops.auto_deploy.torch_moe_router(torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(2))


def test_autocast_changes_no_operator():
    x, weight = torch.randn(1, 5, 3), torch.randn(3, 1, 4)
    ints = [torch.tensor(values, dtype=torch.int32) for values in ([1, 5, 0], [5], [0, 5], [0])]
    step = *ints, torch.zeros(1, dtype=torch.bool)

    def results():
        conv = torch.ops.auto_deploy.torch_cached_causal_conv1d
        kept = conv(x, weight, None, *step, torch.zeros(1, 3, 4), 1, 3, 1, 3, "zeros")
        heads = x[:, None].expand(1, 2, 5, 3)
        return kept, torch.ops.auto_deploy.torch_attention(heads, heads, heads, is_causal=True)

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        for one, other in zip(results(), plain, strict=True):
            assert torch.equal(one, other)
        program = torch.export.export(_Linear(), (x[0], torch.randn(2, 3)))
    assert [node.target for node in program.graph.nodes][2] is torch.ops.auto_deploy.torch_linear_simple.default


class _Linear(torch.nn.Module):
    def forward(self, x, weight):
        return torch.ops.auto_deploy.torch_linear_simple(x, weight, None)


def test_a_cache_keeps_no_history_of_what_is_written_to_it():
    x, weight = torch.randn(2, 1, 3, requires_grad=True), torch.randn(3, 1, 4, requires_grad=True)
    ints = [torch.tensor(values, dtype=torch.int32) for values in ([0, 0, 2], [1, 1], [0, 1, 2], [1, 0])]
    cache = torch.zeros(2, 3, 4)
    metadata = *ints, torch.ones(2, dtype=torch.bool)
    torch.ops.auto_deploy.torch_cached_causal_conv1d(x, weight, None, *metadata, cache, 1, 3, 1, 3, "zeros")
    assert cache[1, :, -1].equal(x[0, 0]) and not cache.requires_grad


def test_an_unavailable_operator_still_traces():
    define("triton_six", needs=(absent(),))

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.ops.shardwise_test.triton_six(x)

    program = torch.export.export(Model(), (torch.zeros(3),))
    assert any(node.target is torch.ops.shardwise_test.triton_six.default for node in program.graph.nodes)


@pytest.mark.parametrize(
    "name,folder,words", [("torch_seven", "nowhere", "no category folder"), ("numpy_seven", "rope", "not a backend")]
)
def test_a_name_or_place_without_meaning_is_refused(name, folder, words):
    with pytest.raises(RuntimeError, match=words):
        define(name, folder)


def test_a_name_is_registered_once():
    define("torch_eight")
    with pytest.raises(RuntimeError, match="registered twice"):
        define("torch_eight")


def test_an_operator_of_another_library_stays():
    other = torch.library.Library("shardwise_test", "FRAGMENT")
    other.define("torch_nine(Tensor x) -> Tensor")
    other.impl("torch_nine", lambda x: x - 1, "CPU")
    define("torch_nine")
    info = next(info for info in operators() if info.name == "torch_nine")
    assert torch.ops.shardwise_test.torch_nine(torch.zeros(1)).item() == -1
    assert info.foreign and info.availability() == (True, "registered by another library")
    other._destroy()


def test_every_operator_names_its_place():
    for info in operators():
        assert info.category in CATEGORIES and info.backend in BACKENDS
        assert (info.implementation.__doc__ or "").strip(), f"{info.name} has no documentation"
        assert info.implementation.__module__.startswith(f"shardwise.ops.{info.category}.")


def test_what_needs_a_package_or_a_device_names_an_operator_with_less_needs():
    names = {info.name: info for info in operators()}
    for info in operators():
        if info.needs:
            chain = [info]
            while chain[-1].needs:
                chain.append(names[chain[-1].instead])
                assert len(chain) < 5, [link.name for link in chain]


def test_the_documentation_lists_every_operator():
    text = (Path(__file__).parents[2] / "docs" / "operators.md").read_text()
    missing = [info.name for info in operators() if f"`{info.name}`" not in text and f"::{info.name}`" not in text]
    assert not missing


def test_the_verb_prints_every_operator_with_its_state(capsys):
    assert main(["ops", "--category", "rope"]) == 0
    printed = capsys.readouterr().out
    rope = [info for info in operators() if info.category == "rope"]
    assert all(f"auto_deploy.{info.name} " in printed for info in rope)
    assert f"{len(rope)} operators" in printed


def test_the_verb_filters_and_writes_json(capsys, tmp_path):
    assert main(["ops", "--backend", "triton", "--category", "mamba", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["operators"]
    assert {row["operator"] for row in rows} >= {"torch.ops.auto_deploy.triton_cached_ssm"}
    assert {(row["backend"], row["category"]) for row in rows} == {("triton", "mamba")}
    assert main(["ops", "--json", str(tmp_path / "ops.json")]) == 0
    assert len(json.loads((tmp_path / "ops.json").read_text())["operators"]) == len(operators())


def test_the_verb_names_legal_choices(capsys):
    assert main(["ops", "--category", "ropes"]) == 2
    assert "choose one of attention, mla, rope" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a CUDA device")
def test_the_benchmark_says_that_it_needs_a_device(capsys):
    assert main(["bench", "ops", "--category", "rope"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert main(["bench", "ops", "--category", "ropes"]) == 2


def test_operators_import_without_triton():
    program = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, shardwise.ops as ops\n"
        "assert not any(i.availability()[0] for i in ops.operators() if i.backend == 'triton')\n"
        "torch.ops.auto_deploy.torch_rmsnorm(torch.ones(1, 8), torch.ones(8), 1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
