"""`task=bench`: measurements of this machine, one JSON line a case."""

import torch

from wan_dist.bench.step import bench_step
from wan_dist.config.schema import Config
from wan_dist.topology import RankEnv


def run(config: Config, env: RankEnv, device: torch.device) -> None:
    """Run the benchmark that `bench=` names."""
    bench_step(config, env, device)
