"""Without a CUDA device, Triton kernels of this test process run in Triton's interpreter.

Triton decides when a kernel is decorated, so this must happen before anything imports triton. The environment
variable is taken back at once and Triton's own switch keeps the choice: processes that tests start see neither, and
behave as on a user's machine. Inside this process the only difference is that `triton_*` operators are available
for CPU tensors; nothing chooses them for CPU tensors by itself.

A kernel's fault breaks the CUDA context of its process and with it every later test; it is looked for after each test
marked `gpu`, and the process ends there, so that the test is named and, under pytest-xdist, a new process goes on.

Under pytest-xdist, a test marked `alone` has the machine to itself, and with `--dist loadfile` (as in `make test`) all
tests that start several processes run in one worker: the other ones go on beside them, one process each.
"""

import fcntl
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from parity import parity, pytest_terminal_summary  # noqa: F401

if not torch.cuda.is_available() and importlib.util.find_spec("triton") and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = True
    del os.environ["TRITON_INTERPRET"]

    from quick_interpreter import make_quick

    make_quick()

if not torch.cuda.is_available():
    # Ranks are threads or processes here, more of them than cores: with several threads each they take twice as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

LOCKS = pytest.StashKey[tempfile.TemporaryDirectory]()
STARTS_PROCESSES = ("tests/comm/", "tests/faults/", "tests/launch/")
IN_ONE_PROCESS = tuple(
    f"tests/comm/test_{name}.py" for name in ("conformance_threads", "p2p_compile", "p2p_kernels", "p2p_model")
)
"""The longest files of these folders whose ranks, if any, are threads."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files to workers, but those that start processes to one of them."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            together = nodeid.startswith(STARTS_PROCESSES) and not nodeid.startswith(IN_ONE_PROCESS)
            return "processes" if together else super()._split_scope(nodeid)

    return Scheduling(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tell pytest-xdist's workers where the locks of this run lie."""
    if LOCKS not in node.config.stash:
        node.config.stash[LOCKS] = tempfile.TemporaryDirectory(prefix="shardwise-tests-")
    node.workerinput["locks"] = node.config.stash[LOCKS].name


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Take the test's share of the machine: all of it for one marked `alone`, else what one takes beside others."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    folder = Path(item.config.workerinput["locks"])
    with (folder / "gate").open("a+") as gate, (folder / "machine").open("a+") as machine:
        fcntl.lockf(gate, fcntl.LOCK_EX)  # while one waits to be alone, nobody else begins
        fcntl.lockf(machine, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.lockf(gate, fcntl.LOCK_UN)
        return (yield)


if torch.cuda.is_available():
    # A graph that ends as garbage amid the capture of another one ends that too.
    torch.compiler.config.force_cudagraph_gc = True


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before its fixtures: what a test draws does not depend on the tests before it, and a failure can be repeated."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes a stack for CUDA at each call: 0.4 ms and more
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """End the process when this test broke its CUDA context."""
    if item.get_closest_marker("gpu") is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        words = f"the CUDA context broke in {item.nodeid}: {str(error).splitlines()[0]}"
        if not hasattr(item.config, "workerinput"):
            pytest.exit(words, returncode=3)
        print(words, file=sys.stderr, flush=True)
        os._exit(3)
