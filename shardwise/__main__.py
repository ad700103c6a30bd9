"""`python -m shardwise` is the `shardwise` command."""

import sys

from shardwise.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
