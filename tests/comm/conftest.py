"""Makes the suite that all transports share importable by name, here and in the ranks that the tests start."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, os.path.dirname(__file__))
