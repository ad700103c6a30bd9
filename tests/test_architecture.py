"""The package's structure: which part may import which, what stays free of torch, which files are listed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "shardwise"
MAY_IMPORT = {
    "partition": set(),
    "kernel_start": set(),
    "plan_cache": {"kernel_start"},
    "comm": {"partition", "kernel_start", "plan_cache"},
    "ops": {"partition", "kernel_start", "plan_cache", "comm"},
    "sharding": {"partition", "comm"},
    "parallel": {"partition", "comm", "ops", "sharding"},
    "launch": {"partition", "comm", "ops", "sharding", "parallel"},
    "testing": {"partition", "comm", "ops", "sharding", "parallel", "launch"},
}
LISTED_OPS = ("ops", "ops/attention", "ops/fla", "ops/mamba", "ops/mla", "ops/normalization")
LISTED = ("comm", "comm/p2p", "sharding", "parallel", "launch", *LISTED_OPS)
"""Packages whose docstring says what each of their files is for."""
COMM_USERS_IN_OPS = {"distributed", "normalization", "moe"}
RANK_TYPES = {"shardwise.comm.rank", "shardwise.comm.base"}


def shardwise_imports(path: Path) -> set[str]:
    """Dotted shardwise modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("shardwise"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardwise"):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add("relative")
    return found


def files():
    return [
        path
        for path in PACKAGE.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py") or path.parent != PACKAGE
    ]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in shardwise_imports(path):
        assert name != "relative", f"{path}: imports are absolute in this package"
        target = (name.split(".") + [""])[1]
        if target in ("__version__", ""):
            continue
        assert target == room or target in MAY_IMPORT[room], f"{path}: {room} may not import {name}"


@pytest.mark.parametrize("folder", LISTED)
def test_a_package_lists_its_files(folder):
    listed = (PACKAGE / folder / "__init__.py").read_text()
    files = [path.stem for path in (PACKAGE / folder).glob("*.py") if path.stem != "__init__"]
    assert [name for name in files if not re.search(rf"\b{name}\b", listed)] == [], f"name them in {folder}/__init__.py"


@pytest.mark.parametrize(
    "path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda path: path.parent.name + "/" + path.name
)
def test_only_three_operator_categories_know_communicators(path):
    uses = {name for name in shardwise_imports(path) if name.startswith("shardwise.comm")}
    assert not uses or path.parent.name in COMM_USERS_IN_OPS


@pytest.mark.parametrize("path", sorted((PACKAGE / "sharding").rglob("*.py")), ids=lambda path: path.name)
def test_the_planner_takes_only_rank_types_from_comm(path):
    uses = {name for name in shardwise_imports(path) if name.startswith("shardwise.comm")}
    assert all(name.rsplit(".", 1)[0] in RANK_TYPES or name in RANK_TYPES for name in uses), uses


TORCH_FREE = [
    "shardwise",
    "shardwise.comm.rank",
    "shardwise.comm.base",
    "shardwise.comm.watch",
    "shardwise.launch.cli",
] + [
    ".".join(("shardwise", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted((PACKAGE / "sharding").rglob("*.py"))
]


def test_planning_modules_import_without_torch():
    program = (
        "import sys, importlib\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise AssertionError('torch was imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {TORCH_FREE!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


OPTIONAL = ("mpi4py", "ray", "flashinfer", "fla", "transformers", "triton", "einops", "huggingface_hub")
KERNELS = "arithmetic asm bulk fp8 gather interpreted launch memory one_shot rows two_shot"
ASKED_FOR_FIRST = ("ops.bench", *(f"comm.p2p.{name}" for name in KERNELS.split()))
"""Beginnings of modules that are imported only where Triton was found."""


def test_every_module_imports_without_the_optional_packages():
    names = [
        ".".join(("shardwise", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for path in files()
    ]
    chosen = [name for name in names if not name.removeprefix("shardwise.").startswith(ASKED_FOR_FIRST)]
    chosen.remove("shardwise.launch.tether")  # a program
    program = (
        "import sys, importlib\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {OPTIONAL!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {chosen!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
