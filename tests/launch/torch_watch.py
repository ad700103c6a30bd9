"""Put in front of every Python process of a job (as sitecustomize): torch must find multicast switched off."""

import os
import sys

SWITCHES = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


class Watch:
    """Sees every import before it happens."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            found = {switch: os.environ.get(switch) for switch in SWITCHES}
            if found != SWITCHES:
                raise AssertionError(f"torch is imported by {sys.argv} with {found}")
        return None


sys.meta_path.insert(0, Watch())


def import_torch(context) -> dict:
    """A rank's body."""
    before = "torch" in sys.modules
    import torch

    watched = any(type(finder).__name__ == "Watch" for finder in sys.meta_path)
    return {"imported before": before, "watched": watched, "torch": torch.__version__}
