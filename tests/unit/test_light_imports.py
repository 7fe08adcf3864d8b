"""What answers at once imports no torch, and the package itself no Hydra either."""

import pytest

from support.commands import run

HEAVY = ("torch", "diffusers", "transformers", "safetensors", "av")
LIGHT = {
    "wan_dist": (*HEAVY, "hydra", "omegaconf", "yaml", "huggingface_hub"),
    "wan_dist.planning.refusals, wan_dist.planning.degrees, wan_dist.planning.defaults": (*HEAVY, "hydra"),
    "wan_dist.distributed.shard_conditions, wan_dist.planning.room, wan_dist.loading.sizes": (*HEAVY, "hydra"),
    "wan_dist.models.architecture, wan_dist.loading.published, wan_dist.planning.weights": (*HEAVY, "hydra"),
    "wan_dist.planning.traffic, wan_dist.planning.cost, wan_dist.planning.patience": (*HEAVY, "hydra"),
    "wan_dist.agent.watchdog, wan_dist.agent.nodes, wan_dist.agent.resume": (*HEAVY, "hydra"),
    "wan_dist.config.freeze, wan_dist.config.store, wan_dist.config.normalise": (*HEAVY, "hydra"),
    "wan_dist.shapes.vocabulary, wan_dist.shapes.outlines, wan_dist.shapes.meaning": (*HEAVY, "hydra"),
    "wan_dist.shapes.clips, wan_dist.shapes.captions": (*HEAVY, "hydra"),
    "wan_dist.cli.main, wan_dist.cli.overrides": (*HEAVY, "huggingface_hub"),
}


@pytest.mark.parametrize("modules", LIGHT)
def test_import_is_light(tmp_path, modules):
    script = f"import sys, {modules}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = run(["python", "-c", script], tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & set(LIGHT[modules])
