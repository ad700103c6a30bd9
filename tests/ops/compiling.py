"""Programs that compile kernels for Hopper, which a test process cannot whose kernels are made for the interpreter."""

import os
import subprocess
import sys
from pathlib import Path


def printed(program: Path, *, timeout: float = 240) -> list[str]:
    """The lines that a program prints, run with Triton's compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
