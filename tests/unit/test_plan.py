"""What every recipe would do on machines that are not here: `task=plan`, in this process."""

from math import ceil, prod

import pytest

from support.plans import GB, best_of, planned
from support.tiers import ALL, all_only
from wan_dist.cli.overrides import check_overrides
from wan_dist.config.store import group_options
from wan_dist.planning.degrees import AXES

RANKS, MODELS = [1, 2, 4, 8, 16], group_options("model")


@pytest.mark.parametrize(
    ("model", "ranks"),
    [(m, r) for m in MODELS for r in RANKS if ALL or RANKS.index(r) == 2 * MODELS.index(m) % len(RANKS)],
)
def test_every_recipe_on_every_machine(capsys, model, ranks):
    gigabytes = (24, 80, 141)[(RANKS.index(ranks) + MODELS.index(model)) % 3]
    machine = [f"plan.ranks={ranks}", f"plan.nodes={ceil(ranks / 8)}", f"plan.device_memory_gb={gigabytes}"]
    answer = planned(capsys, f"model={model}", *machine)
    meshes = answer.document["meshes"]
    assert all(prod(mesh["mesh"].values()) == ranks for mesh in meshes)
    for mesh in meshes:
        assert mesh["possible"] != ("refused" in mesh)
        if mesh["possible"]:
            assert mesh["peak_device_bytes"] <= gigabytes * GB
            assert mesh["peak_device_bytes"] == max(mesh["device_bytes"].values())
            assert all(line["reason"] for line in mesh["plan"])
        else:
            assert mesh["refused"] and all(mesh["refused"])
            named = " x ".join(f"{axis} {mesh['mesh'][axis]}" for axis in AXES if mesh["mesh"][axis] > 1)
            assert f"refused: {named or 'one rank'}: {mesh['refused'][0]}" in answer.err or answer.refusals
    if answer.refusals is None:
        best, table = best_of(answer.document), answer.err.splitlines()
        assert len([line for line in table if line.startswith("| best |")]) == 1
        assert len([line for line in table if line.startswith("best: ")]) == 1
        assert best["video_s"] <= 1.05 * min(mesh["video_s"] for mesh in meshes if mesh["possible"])
        typed = answer.document["best"]["overrides"].split()
        assert check_overrides(typed) == ([], typed)
    else:
        assert answer.document["best"] is None and not any(mesh["possible"] for mesh in meshes)
        assert any("GB a rank" in str(refusal) for refusal in answer.refusals)


def test_what_the_best_mesh_says_to_type_is_that_mesh(capsys):
    machine = ["model=wan2_2_t2v_a14b", "plan.ranks=8", "plan.device_memory_gb=48"]
    first = planned(capsys, *machine).document
    again = planned(capsys, *machine, *first["best"]["overrides"].split()).document
    assert len(again["meshes"]) == 1 and again["meshes"][0] == best_of(first)


@all_only
def test_every_recipe_can_run_somewhere(capsys):
    for model in group_options("model"):
        assert planned(capsys, f"model={model}", "plan.ranks=1", "plan.device_memory_gb=24").refusals is None
