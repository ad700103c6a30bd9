"""What the machine can do: devices, links, and the small JSON file that describes both.

Built-in devices carry datasheet rates scaled to what a plain copy or a large matrix product reaches; a file written by
`shardwise bench comm --calibrate` replaces them by measured figures. Units are in the names: bytes, seconds, FLOP/s.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from shardwise.sharding.config import ConfigError, read_json

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """One rank's connection to its peers."""

    bandwidth_bytes_per_second: float
    """One direction, as a large collective reaches it."""
    latency_seconds: float
    """A small all-reduce between two ranks, launch included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator, or one CPU rank."""

    name: str
    memory_bytes: int
    memory_bandwidth_bytes_per_second: float
    """As a copy reaches it, bytes read plus bytes written."""
    flops_16bit: float
    """Dense bf16/fp16 matrix products."""
    flops_8bit: float
    """Dense FP8 matrix products; equal to `flops_16bit` where the hardware has no FP8."""
    launch_seconds: float
    """What a kernel inside a captured graph takes beyond its bytes: launch, first loads, the last blocks' end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """A homogeneous cluster: `ranks_per_node` devices on each of `nodes` hosts; `spread` says where ranks lie in it."""

    device: Device
    intra: Link
    """Between ranks of one node."""
    inter: Link
    """Between nodes, for each rank."""
    ranks_per_node: int = 8
    nodes: int = 1
    source: str = "built in"
    """Where the figures come from."""

    def spread(self, ranks: int, nodes: int | None = None) -> "Topology":
        """`ranks` ranks on `nodes` hosts of this kind, as many on each; None: on as few as hold them.

        ValueError lists the legal numbers of nodes.
        """
        legal = [n for n in range(1, ranks + 1) if ranks % n == 0 and ranks // n <= self.ranks_per_node]
        nodes = legal[0] if nodes is None else nodes
        if nodes not in legal:
            raise ValueError(
                f"--nodes {nodes}: {ranks} ranks, as many on each node and at most {self.ranks_per_node}, lie on "
                f"{', '.join(map(str, legal))}"
            )
        return replace(self, nodes=nodes, ranks_per_node=ranks // nodes)

    def link(self, ranks: int) -> Link:
        """The slowest link that a group of `ranks` consecutive ranks crosses, the first of them or any other."""
        aligned = self.nodes == 1 or self.ranks_per_node % ranks == 0
        return self.intra if aligned and ranks <= self.ranks_per_node else self.inter


def _device(name, memory_gib, bandwidth_tb, tflops16, tflops8) -> Device:
    return Device(
        name=name,
        memory_bytes=int(memory_gib * 2**30),
        memory_bandwidth_bytes_per_second=bandwidth_tb * 1e12,
        flops_16bit=tflops16 * 1e12,
        flops_8bit=tflops8 * 1e12,
        launch_seconds=4e-6,
    )


def _link(gb_per_second: float, latency_us: float) -> Link:
    return Link(bandwidth_bytes_per_second=gb_per_second * 1e9, latency_seconds=latency_us * 1e-6)


_NETWORK = _link(45, 20)

# H200, measured: copy 4.2 TB/s, bf16 product 700 TFLOP/s, all-reduce of two 350 GB/s and 3 us
# (benchmarks/results); steps of four models take 2.6 to 5.1 us a kernel beyond their bytes
# (benchmarks/planner_accuracy.py). H100: copy measured. The others take the H200's fractions of their datasheets:
# 0.88 of the memory's rate, 0.71 of the products', 0.78 of the link's. cpu: one core of a server VM, measured
# GEMV and GEMM.
BUILT_IN = {
    topology.device.name: topology
    for topology in (
        Topology(device=_device("h200", 139.8, 4.2, 700, 1400), intra=_link(350, 3.0), inter=_NETWORK),
        Topology(device=_device("h100", 79.6, 3.0, 700, 1400), intra=_link(350, 3.0), inter=_NETWORK),
        Topology(device=_device("b200", 179.0, 7.0, 1600, 3200), intra=_link(700, 3.0), inter=_NETWORK),
        Topology(device=_device("a100", 79.3, 1.79, 221, 221), intra=_link(234, 4.0), inter=_link(22, 20)),
        Topology(device=_device("mi300x", 191.5, 4.66, 928, 1856), intra=_link(50, 8.0), inter=_NETWORK),
        Topology(
            device=_device("cpu", 16.0, 0.014, 0.1, 0.1),
            intra=_link(4, 10.0),
            inter=_link(1, 60.0),
            ranks_per_node=2,
        ),
    )
}


def load(name_or_file: str) -> Topology:
    """A built-in device by name, or a topology file. ValueError for neither, ConfigError names file and field."""
    if name_or_file in BUILT_IN:
        return BUILT_IN[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise ValueError(f"{name_or_file}: neither a file nor one of {', '.join(BUILT_IN)}")
    return from_json(read_json(path, dict, "an object"), str(path))


def save(topology: Topology, path: str | Path) -> None:
    """Write `topology` as JSON, readable by `load`."""
    Path(path).write_text(json.dumps({"schema_version": SCHEMA_VERSION, **asdict(topology)}, indent=2) + "\n")


def from_json(data: object, source: str) -> Topology:
    """Topology from the JSON object that `save` wrote. Raises ConfigError naming `source` and field."""
    record = _object(data, source, "")
    version = record.pop("schema_version", None)
    if version is None:
        raise ConfigError(
            f"{source}: no topology, it has no schema_version: `shardwise bench comm --calibrate FILE` writes one"
        )
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{source}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}: calibrate anew"
        )
    parts = {"device": Device, "intra": Link, "inter": Link}
    for key, kind in parts.items():
        record[key] = _build(kind, record.get(key), source, key + ".")
    return _build(Topology, record, source, "")


def _object(data: object, source: str, where: str) -> dict:
    if not isinstance(data, dict):
        found = "missing" if data is None else type(data).__name__
        raise ConfigError(f"{source}: {where or 'the file'} is {found}, should be an object")
    return dict(data)


def _build(kind, data: object, source: str, prefix: str):
    record = _object(data, source, prefix.rstrip("."))
    known = {field.name: field.type for field in fields(kind)}
    unknown = sorted(set(record) - known.keys())
    if unknown:
        raise ConfigError(f"{source}: unknown field {prefix}{unknown[0]}; known: {', '.join(sorted(known))}")
    for name, value in record.items():
        if not isinstance(value, Device | Link) and (expected := _expected(known[name], value)):
            raise ConfigError(f"{source}: {prefix}{name} is {value!r}, should be {expected}")
    try:
        return kind(**record)
    except TypeError as error:
        raise ConfigError(f"{source}: {prefix or 'topology'}: {str(error).split(') ')[-1]}") from None


def _expected(kind: object, value: object) -> str | None:
    """What a field of this type should be, where `value` is not."""
    if kind is str:
        return None if isinstance(value, str) else "a text"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        return "a positive number"
    return "a whole number" if kind is int and value != int(value) else None
