"""Makes the suite that all transports share importable by name, here and in the ranks that the tests start."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ranks that are threads wait for each other on one GPU: streams that share a hardware queue would run in turn.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
sys.path.insert(0, os.path.dirname(__file__))
