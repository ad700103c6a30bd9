"""Registration and availability of operators.

One decorator defines an operator: the decorated function's annotations give the schema, `fake` its meta
function, `mutates` the arguments written in place, `needs` what must be present to run it. Every operator is
registered on every machine; calling one whose needs are not met raises `OperatorUnavailable`.

    def _fake(input, weight, eps):
        return torch.empty_like(input)

    @operator(fake=_fake, needs=(TRITON,), instead="torch_rmsnorm")
    def triton_rms_norm(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

The decorator returns the plain function, which the runtime may call directly: `Library.define` and `impl` add 1.3 µs
of host time to an eager call, `custom_op` 7 µs and with mutated arguments 11 µs (benchmarks/ops_dispatch.py, CPU).
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from shardwise.ops.triton_support import interpreting

CATEGORIES = (
    "attention",
    "mla",
    "rope",
    "linear",
    "swiglu",
    "moe",
    "quantization",
    "normalization",
    "mamba",
    "fla",
    "distributed",
    "utils",
)
BACKENDS = ("torch", "triton", "flashinfer", "trtllm", "fla", "cuda")

# Names that do not start with their backend, with the backend that serves them.
IRREGULAR = {
    "sharded_rmsnorm": "torch",
    "gather_logits_before_lm_head": "torch",
    "gather_tokens": "torch",
    "fused_swiglu_mlp": "torch",
    "fused_nvfp4_swiglu_mlp": "torch",
    "fused_finegrained_fp8_swiglu_mlp": "torch",
    "mamba_ssm_prepare_metadata": "torch",
    "trtllm_fused_allreduce_residual_rmsnorm": "trtllm",
}


class OperatorUnavailable(RuntimeError):
    """The operator exists, but this machine cannot run it; the text names what is missing and what to call instead."""


@dataclass(frozen=True)
class Need:
    """Something an operator requires. `probe` returns (present, reason) and never raises."""

    name: str
    probe: Callable[[], tuple[bool, str]]
    on_cpu: Callable[[], bool] = lambda: False
    """Whether operators with this need take CPU tensors."""

    @functools.cached_property
    def state(self) -> tuple[bool, str]:
        return self.probe()


def _package(module: str, install: str) -> Callable[[], tuple[bool, str]]:
    """A package whose kernels run on CUDA devices only."""

    def probe():
        if importlib.util.find_spec(module) is None:
            return False, f"the package {install} is not installed"
        return _cuda()

    return probe


def _triton() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    if interpreting():
        return True, "triton's interpreter on CPU tensors"
    present, reason = _cuda()
    return present, reason if present else f"{reason} (TRITON_INTERPRET=1 runs it slowly on the CPU)"


def _cuda() -> tuple[bool, str]:
    found = torch.cuda.is_available()
    return found, torch.cuda.get_device_name() if found else "no CUDA device"


def _nvcc() -> tuple[bool, str]:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    return path is not None, path or "no CUDA compiler (nvcc) on PATH or under CUDA_HOME"


TRITON = Need("triton", _triton, on_cpu=interpreting)
CUDA = Need("cuda", _cuda)
NVCC = Need("nvcc", _nvcc)
FLASHINFER = Need("flashinfer", _package("flashinfer", "flashinfer-python"))
FLA = Need("fla", _package("fla", "fla-core"))


@dataclass(frozen=True)
class OpInfo:
    """What is known about one operator."""

    namespace: str
    name: str
    category: str
    backend: str
    schema: str
    mutates: tuple[str, ...]
    needs: tuple[Need, ...]
    instead: str | None
    """An operator with the same meaning that runs on more machines."""
    foreign: bool = False
    """The name was already registered by another library, whose operator stays."""
    implementation: Callable | None = field(repr=False, compare=False, default=None)

    @property
    def qualified_name(self) -> str:
        return f"{self.namespace}::{self.name}"

    def availability(self) -> tuple[bool, str]:
        """(runs here, reason)."""
        if self.foreign:
            return True, "registered by another library"
        for need in self.needs:
            present, reason = need.state
            if not present:
                return False, reason
        return True, self.needs[0].state[1] if self.needs else "plain PyTorch"


_OPERATORS: dict[str, OpInfo] = {}
_LIBRARIES: dict[str, torch.library.Library] = {}


def operators() -> list[OpInfo]:
    """All operators, by category and name."""
    return sorted(_OPERATORS.values(), key=lambda info: (CATEGORIES.index(info.category), info.name))


def operator(
    *,
    fake: Callable,
    mutates: tuple[str, ...] = (),
    needs: tuple[Need, ...] = (),
    instead: str | None = None,
    namespace: str = "auto_deploy",
):
    """Register the decorated function as `torch.ops.<namespace>.<function name>`.

    fake       same arguments, returns empty tensors of the right shape, dtype, device and strides
    mutates    names of the arguments that are written in place
    needs      what must be present; checked at the first call, not at import
    instead    the operator that the error names when a need is not met
    Category and backend come from the module's folder and the operator's name.
    """

    def decorate(function: Callable) -> Callable:
        info = _describe(function, mutates, needs, instead, namespace)
        if info.qualified_name in _OPERATORS:
            raise RuntimeError(f"operator {info.qualified_name} is registered twice")
        _OPERATORS[info.qualified_name] = info
        if not info.foreign:
            _define(info, function, fake)
        return function

    return decorate


def _describe(function, mutates, needs, instead, namespace) -> OpInfo:
    name = function.__name__
    category = function.__module__.split(".")[-2]
    if category not in CATEGORIES:
        raise RuntimeError(f"operator {name}: its module {function.__module__} is in no category folder of ops/")
    backend = IRREGULAR.get(name) or name.split("_", 1)[0]
    if backend not in BACKENDS:
        raise RuntimeError(f"operator {name}: {backend} is not a backend; irregular names stand in registry.IRREGULAR")
    return OpInfo(
        namespace=namespace,
        name=name,
        category=category,
        backend=backend,
        schema=torch.library.infer_schema(function, mutates_args=mutates),
        mutates=tuple(mutates),
        needs=tuple(needs),
        instead=instead,
        foreign=hasattr(getattr(torch.ops, namespace), name),
        implementation=function,
    )


def _define(info: OpInfo, function: Callable, fake: Callable) -> None:
    if info.backend == "torch" and any(name.endswith("cache") for name in info.mutates):
        function = torch.no_grad()(function)  # else a cache would keep the history of all that was written to it
    library = _LIBRARIES.setdefault(info.namespace, torch.library.Library(info.namespace, "FRAGMENT"))
    library.define(info.name + info.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(info.name, _guarded(info, function, on_cpu=True), "CPU")
    library.impl(info.name, _guarded(info, function, on_cpu=False), "CUDA")
    for device in ("cpu", "cuda"):
        library.impl(info.name, _apart_from_autocast(info, device), f"Autocast{device.upper()}")
    torch.library.register_fake(info.qualified_name, fake, lib=library)


def _apart_from_autocast(info: OpInfo, device: str) -> Callable:
    """The operator as it is outside of `torch.autocast`, which would round its products and leave the fake's dtype.

    PyTorch calls this where autocast is on, and nothing where it is off.
    """

    def call(*args):
        with torch.autocast(device, enabled=False):
            return getattr(getattr(torch.ops, info.namespace), info.name).default(*args)

    return call


def _guarded(info: OpInfo, function: Callable, on_cpu: bool) -> Callable:
    """Check the needs at the first call only, afterwards one test of a flag per call; errors name the operator.

    PyTorch hands arguments over by position, since no schema has some that only a name can give.
    """
    checked = not info.needs

    @functools.wraps(function)
    def call(*args):
        nonlocal checked
        if not checked:
            _require(info, on_cpu)
            checked = True
        try:
            return function(*args)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError) as error:
            named = _named(info, args, error)
            if named is None:
                raise
            raise named from error

    return call


def _named(info: OpInfo, args: tuple, error: Exception) -> Exception | None:
    """An error that names the operator, in place of one that does not; PyTorch lets None pass for any tensor, which
    shows where its attributes are missing, tensors on different devices, which shows at the first product, and tensors
    of any rank, which shows where a dimension is missing."""
    if info.name in str(error):
        return None
    schema = getattr(getattr(torch.ops, info.namespace), info.name).default._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
    for argument in schema.arguments:
        if str(argument.type) == "Tensor" and given[argument.name] is None:
            return ValueError(f"{info.name}: {argument.name} is None; legal: a tensor")
    tensors = [t for name, t in given.items() if isinstance(t, torch.Tensor) and not name.endswith("_host")]
    if type(error) is RuntimeError and len({tensor.device for tensor in tensors}) > 1:
        places = ", ".join(sorted({str(tensor.device) for tensor in tensors}))
        return ValueError(f"{info.name}: tensors lie on {places}; legal: one device for all but those named *_host")
    if type(error) is IndexError:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in given.items() if isinstance(t, torch.Tensor))
        return ValueError(
            f"{info.name}: a tensor has too few dimensions, or an index leaves its tensor ({error}): {shapes}"
        )
    return type(error)(f"{info.name}: {error}") if type(error) in (TypeError, ValueError) else None


def _require(info: OpInfo, on_cpu: bool) -> None:
    available, reason = info.availability()
    if available and on_cpu and not all(need.on_cpu() for need in info.needs):
        available, reason = False, "its tensors are on the CPU"
    if not available:
        alternative = f"; call {info.namespace}::{info.instead} instead" if info.instead else ""
        raise OperatorUnavailable(f"{info.qualified_name} cannot run here: {reason}{alternative}")
