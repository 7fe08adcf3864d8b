"""`task=bench`: measurements of this machine and predictions for larger ones, one JSON line a case."""

import torch

from wan_dist.config.schema import Config
from wan_dist.topology import RankEnv


def run(config: Config, env: RankEnv, device: torch.device) -> None:
    """Run the benchmark that `bench=` names."""
    if config.bench.kind == "scale":
        from wan_dist.bench.scale import bench_scale

        bench_scale(config)
    elif config.bench.kind == "load":
        from wan_dist.bench.load import bench_load

        bench_load(config, env, device)
    elif config.bench.kind == "vae":
        from wan_dist.bench.vae import bench_vae

        bench_vae(config, env, device)
    elif config.bench.kind == "offload":
        from wan_dist.bench.offload import bench_offload

        bench_offload(config, device)
    elif config.bench.kind == "state":
        from wan_dist.bench.state import bench_state

        bench_state(config, device)
    elif config.bench.kind == "meaning":
        from wan_dist.bench.meaning import bench_meaning

        bench_meaning(config, env, device)
    else:
        from wan_dist.bench.step import bench_step

        bench_step(config, env, device)
