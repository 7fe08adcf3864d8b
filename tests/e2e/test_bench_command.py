"""`task=bench`: a JSON line for each case, and the bytes that Ulysses' formula says."""

import json

import pytest

from e2e.processes import files_in
from support.commands import wan_dist

BLOCKS, HEADS, HEAD_DIM, RANKS, FORWARDS, FP32 = 2, 4, 32, 2, 2, 4
TOKENS = 1 * (16 // 2) * (16 // 2)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The finished command, its lines by case, and its working folder."""
    cwd = tmp_path_factory.mktemp("bench")
    shape = [f"bench.blocks={BLOCKS}", f"bench.heads={HEADS}", f"bench.head_dim={HEAD_DIM}", "bench.ffn=128"]
    shape += ["bench.frames=1", "bench.rows=16", "bench.columns=16", "bench.repeats=1", "bench.text_dim=64"]
    done = wan_dist("task=bench", *shape, f"parallelism.ulysses={RANKS}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [line["case"] for line in lines], {line["case"]: line for line in lines}, cwd


def test_every_case_is_one_line(bench):
    cases, lines, cwd = bench
    assert cases == ["diffusers", "one_rank", "mesh"]
    assert [lines[case]["ranks"] for case in cases] == [1, 1, RANKS]
    for line in lines.values():
        assert line["tokens"] == TOKENS and line["forwards_per_step"] == FORWARDS
        assert line["dtype"] == "float32" and line["median_s"] > 0 and len(line["all_s"]) == 1
    assert lines["diffusers"]["ratio"] == 1 and lines["one_rank"]["ratio"] > 0 and lines["mesh"]["speedup"] > 0
    assert lines["mesh"]["mesh"]["ulysses"] == RANKS
    assert files_in(cwd) == set()


def test_bytes_of_the_all_to_alls(bench):
    """q, k, v and the output: `4 (L/P) d (P-1)/P` elements a block and forward leave each rank."""
    elements = 4 * (TOKENS // RANKS) * HEADS * HEAD_DIM * (RANKS - 1) // RANKS
    sent = bench[1]["mesh"]["bytes_sent"]
    assert [rank["all_to_all"] for rank in sent] == [elements * FP32 * BLOCKS * FORWARDS] * RANKS
