"""One table drives all operators: values, fakes, schemas, mutation, export and compile."""

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from operator_samples import Sample, all_samples, flat, mutated, written
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import shardwise.ops as ops

CONTRACT = json.loads((Path(__file__).parent / "ops_schema.json").read_text())
SAMPLES = all_samples()
INFOS = {info.qualified_name: info for info in ops.operators()}
ON_CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter


def devices(sample: Sample) -> list[str]:
    """Where the sample can run on this machine."""
    info = INFOS[sample.qualified_name]
    if not info.availability()[0]:
        return []
    cpu = all(need.on_cpu() for need in info.needs)
    return ["cpu"] * cpu + ["cuda"] * ON_CUDA


RUNS = [
    pytest.param(sample, device, id=f"{sample}-{device}", marks=[pytest.mark.gpu] if device == "cuda" else [])
    for sample in SAMPLES
    for device in devices(sample)
]
runs = pytest.mark.parametrize("sample,device", RUNS)


def build(sample: Sample, device: str) -> tuple:
    torch.manual_seed(0)
    return sample.build(device)


@functools.cache
def outcome(sample: Sample, device: str) -> tuple[tuple, list, list]:
    """(arguments before, results, mutated arguments) of the sample's call."""
    args = build(sample, device)
    before = copy.deepcopy(args)
    return before, flat(sample.overload(*args)), mutated(sample.overload, args)


@runs
def test_values_agree_with_the_oracle(sample, device):
    if sample.oracle is None:
        pytest.skip("values are proven elsewhere")
    args, results, changed = outcome(sample, device)
    expected, got = sample.oracle(*args), results + changed
    assert len(got) == len(expected)
    for result, wanted in zip(got, expected, strict=True):
        assert result.shape == wanted.shape
        result, wanted = result.double().cpu(), wanted.double().cpu()
        worst = ((result - wanted).abs() / wanted.abs().clamp(min=1)).max().item() if result.numel() else 0.0
        assert worst <= sample.atol, f"largest difference {worst:.3g}"


@runs
def test_the_fake_tells_shape_dtype_device_and_strides(sample, device):
    args = build(sample, device)
    with FakeTensorMode() as mode:
        fakes = flat(sample.overload(*_convert(args, mode.from_tensor)))
    _, real, _ = outcome(sample, device)
    assert len(real) == len(fakes)
    for one, fake in zip(real, fakes, strict=True):
        assert (one.dtype, one.device.type) == (fake.dtype, fake.device.type)
        if sample.bound:
            assert one.dim() == fake.dim() and all(a <= b for a, b in zip(one.shape, fake.shape, strict=True))
        else:
            assert one.shape == fake.shape
            assert one.stride() == fake.stride() or one.numel() == 0


def _convert(value, function):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_convert(item, function) for item in value)
    return value


@runs
def test_opcheck(sample, device):
    args = build(sample, device)
    checks = ["test_autograd_registration"]
    # The schema check compares the arguments before and after, which torch cannot do for float8.
    if not any(getattr(leaf, "dtype", None) == torch.float8_e4m3fn for leaf in tree_leaves(args)):
        checks.append("test_schema")
    if not sample.bound:
        checks.append("test_faketensor")
    torch.library.opcheck(sample.overload, args, test_utils=checks)


class _Call(torch.nn.Module):
    """The operator with its tensors as inputs and everything else fixed."""

    def __init__(self, overload, args):
        super().__init__()
        self.overload, self.args, self.written = overload, args, written(overload)

    def forward(self, *tensors):
        tensors = iter(tensors)
        args = [next(tensors) if isinstance(value, torch.Tensor) else value for value in self.args]
        result = self.overload(*args)
        return result if result is not None else [args[i] for i in self.written]


@pytest.mark.parametrize("sample,device", [run for run in RUNS if run.values[0].traced])
@pytest.mark.parametrize("how", ["export", "compile"])
def test_a_traced_call_gives_the_same_result(sample, device, how):
    args = build(sample, device)
    module = _Call(sample.overload, args)

    def tensors():
        return tuple(copy.deepcopy(value) for value in args if isinstance(value, torch.Tensor))

    _, results, changed = outcome(sample, device)
    expected = results or changed
    if how == "export":
        program = torch.export.export(module, tensors())
        assert any(node.target is sample.overload for node in program.graph.nodes)
        got = flat(program.module()(*tensors()))
    else:
        torch._dynamo.reset()
        got = flat(torch.compile(module, backend="aot_eager", fullgraph=True)(*tensors()))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def _on_fake_cuda(mode, argument, value):
    """`value` with every tensor as a fake one on a GPU, but for metadata that belongs on the host."""
    device = "cpu" if "_host" in argument else "cuda"
    with mode:
        return _convert(value, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device))


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.traced and not devices(s)], ids=str)
def test_an_operator_without_its_device_is_exported_and_functionalised(sample):
    """All of export and compile that comes before the operator runs, mutated arguments included."""
    mode, schema = FakeTensorMode(allow_non_fake_inputs=True), sample.overload._schema
    names = [argument.name for argument in schema.arguments]
    args = [_on_fake_cuda(mode, *pair) for pair in zip(names, build(sample, "cpu"), strict=False)]
    tensors = tuple(value for value in args if isinstance(value, torch.Tensor))
    with mode:
        program = torch.export.export(_Call(sample.overload, args), tensors)
    assert any(node.target is sample.overload for node in program.graph.nodes)
    changed = set(program.run_decompositions({}).graph_signature.user_inputs_to_mutate.values())
    inputs = [name for name, value in zip(names, args, strict=False) if isinstance(value, torch.Tensor)]
    wanted = {names[i] for i in written(sample.overload)}
    assert {inputs[program.graph_signature.user_inputs.index(name)] for name in changed} == wanted


@pytest.mark.parametrize("name", sorted(INFOS))
def test_every_operator_has_one_sample_that_is_traced(name):
    assert sum(sample.traced for sample in SAMPLES if sample.qualified_name == name) == 1


def _signature(schema):
    arguments = [
        (a.name, str(a.type), a.has_default_value(), a.default_value if a.has_default_value() else None)
        for a in schema.arguments
    ]
    return arguments, [str(r.type) for r in schema.returns]


@pytest.mark.parametrize("row", CONTRACT, ids=lambda row: row["op"])
def test_schema_is_the_documented_one(row):
    namespace, name = row["op"].split("::")
    overload = getattr(getattr(torch.ops, namespace), name).default
    assert _signature(overload._schema) == _signature(torch._C.parse_schema(row["op"] + row["schema"]))
    names = [overload._schema.arguments[i].name for i in written(overload)]
    assert sorted(names) == sorted(row["mutates"])


@pytest.mark.parametrize("name", sorted(INFOS))
def test_a_missing_backend_is_one_clear_sentence(name):
    info = INFOS[name]
    assert info.instead is None or f"{info.namespace}::{info.instead}" in INFOS
    available, reason = info.availability()
    assert reason
    if available:
        return
    sample = next(sample for sample in SAMPLES if sample.qualified_name == name)
    with pytest.raises(ops.OperatorUnavailable) as caught:
        sample.overload(*build(sample, "cpu"))
    assert name in str(caught.value) and reason in str(caught.value) and "\n" not in str(caught.value)
    assert (info.instead or name) in str(caught.value)
