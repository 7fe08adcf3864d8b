"""The file to point torchrun at: `torchrun --nproc-per-node 8 launch/generate.py prompt="a cat surfing"`."""

import sys
from pathlib import Path

# A checkout's launcher runs the checkout's package, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wan_dist.cli.main import main

if __name__ == "__main__":
    main()
