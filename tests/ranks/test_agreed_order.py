"""The order of loading is rank 0's on every rank, also where sizes look different from there."""

import pytest

from support.ranks import frozen, run_cases, run_generation, run_ranks
from support.sharded import mesh_of
from wan_dist.loading import components
from wan_dist.loading.order import ComponentLoadSpec, agreed_order
from wan_dist.pipeline import experts, text

NAMES = ["transformer", "transformer_2", "text_encoder", "vae"]


def order(env, sizes: list[list[int | None]]) -> list[str]:
    specs = [ComponentLoadSpec(name, index, sizes[env.rank][index]) for index, name in enumerate(NAMES)]
    with mesh_of(env, ring=env.world_size) as mesh:
        return agreed_order(mesh.world, specs)


@pytest.mark.parametrize("liar", [1, 2])
def test_it_is_that_of_rank_0(liar):
    sizes: list[list[int | None]] = [[40, 30, 20, 10]] * 3
    lies = sizes.copy()
    lies[liar] = [10, None, 50, 40]
    truth, told = run_cases(3, order, [(sizes,), (lies,)])
    assert told == truth == [["transformer", "transformer_2", "text_encoder", "vae"]] * 3


def read_in_order(env, config, liar: int) -> list[str]:
    """The components that a rank read, in order, where one rank takes the first expert for the larger one."""
    served_bytes, fill, read = components.served_bytes, experts.fill, []

    def twice_for_the_first(folder, **how):
        return served_bytes(folder, **how) * (2 if folder.name == "transformer" else 1)

    def noted_fill(weights, **how):
        read.append(how["component"])
        return fill(weights, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "fill", noted_fill)
        patch.setattr(text, "fill", noted_fill)
        if env.rank == liar:
            patch.setattr(components, "served_bytes", twice_for_the_first)
        run_generation(env, config)
    return read


def test_experts_are_loaded_in_it(tmp_path, checkpoints):
    path = checkpoints(experts=2, boundary_ratio=0.9, seed=2)
    config = frozen(tmp_path, path, **{"parallelism.cfg": 1, "parallelism.ring": 2, "parallelism.fsdp.enabled": "on"})
    first, second = run_ranks(2, read_in_order, config, 1)
    assert first == ["text_encoder", "transformer_2", "transformer"]
    assert second == ["transformer_2", "transformer"]
