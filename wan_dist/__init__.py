"""wan_dist: Wan2.1 / Wan2.2 video generation on one or many GPUs, from checkpoints in diffusers format.

Importing the package imports neither torch nor Hydra, so that `--help` and refused configs answer at once.
"""

__version__ = "0.1.0"
