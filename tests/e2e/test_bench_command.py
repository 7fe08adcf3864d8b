"""`task=bench`: a JSON line for each case, bytes that the formulas say, and a table where there is one."""

import json

import pytest

from e2e.processes import files_in, together
from support.commands import wan_dist
from support.tiers import all_only, in_all, named_in_all

BLOCKS, HEADS, HEAD_DIM, RANKS, FORWARDS, FP32, BF16 = 2, 4, 32, 2, 2, 4, 2
TOKENS = 1 * (16 // 2) * (16 // 2)
LATENT_FRAMES, LATENT_ROWS, LATENT_COLUMNS, STRIDE = 2, 1, 4, 8
WIDTH_14B, BLOCKS_14B, TOKENS_480P, TOKENS_720P = 5120, 2, 32760, 75600
STATE_ROWS, SCENES = 16, 2
STREAMED_BLOCKS = 6  # more than the deepest ring has slots

SHAPE = [f"bench.blocks={BLOCKS}", f"bench.heads={HEADS}", f"bench.head_dim={HEAD_DIM}", "bench.ffn=128"]
SHAPE += ["bench.text_dim=64", "bench.repeats=1"]
COMMANDS = {
    "step": [*SHAPE, "bench.frames=1", "bench.rows=16", "bench.columns=16", f"parallelism.ulysses={RANKS}"],
    "load": ["bench=load", *SHAPE, "parallelism=tp2", "runtime.dtype=bfloat16"],
    **named_in_all(
        {
            "load named": [
                "bench=load",
                "model=tiny",
                "parallelism=ring2",
                "parallelism.fsdp.enabled=on",
                "bench.repeats=1",
            ]
        }
    ),
    "vae": [
        *("bench=vae", "model=tiny", f"parallelism.ulysses={RANKS}", "bench.repeats=1"),
        *(f"bench.frames={LATENT_FRAMES}", f"bench.rows={RANKS * LATENT_ROWS}", f"bench.columns={LATENT_COLUMNS}"),
    ],
    "offload": [
        *("bench=offload", *SHAPE, f"bench.blocks={STREAMED_BLOCKS}"),
        *("bench.frames=1", "bench.rows=16", "bench.columns=16"),
    ],
    "state": [
        *("bench=state", *SHAPE, "bench.repeats=3", "sampler.steps=4"),
        *("bench.frames=1", f"bench.rows={STATE_ROWS}", "bench.columns=2"),
    ],
    "meaning": [
        *("bench=meaning", f"bench.scenes={SCENES}", f"parallelism.cfg={RANKS}"),
        *("sampler.steps=10", "video.num_frames=9", "sampler.seed=3"),
    ],
    "scale": ["bench=scale", f"bench.blocks={BLOCKS_14B}", "bench.worlds=[8,64]"],
    **named_in_all(
        {
            "scale sharded": [
                *("bench=scale", f"bench.blocks={BLOCKS_14B}", "bench.worlds=[16]", "bench.videos=[480x832x81]"),
                *("parallelism.tp=2", "parallelism.fsdp.enabled=on", "parallelism.fsdp.replicate=2"),
            ]
        }
    ),
}


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    """`{name: (its JSON lines, its stderr, its working folder)}`."""
    cwds = [tmp_path_factory.mktemp("bench") for _ in COMMANDS]
    runs = [
        lambda words=words, cwd=cwd: wan_dist("task=bench", *words, cwd=cwd)
        for words, cwd in zip(COMMANDS.values(), cwds, strict=True)
    ]
    results = {}
    for name, cwd, done in zip(COMMANDS, cwds, together(*runs), strict=True):
        assert done.returncode == 0, done.stderr
        results[name] = ([json.loads(line) for line in done.stdout.splitlines()], done.stderr, cwd)
    return results


@pytest.fixture
def step(benches):
    return {line["case"]: line for line in benches["step"][0]}


def test_nothing_is_left_behind(benches):
    for _, _, cwd in benches.values():
        assert files_in(cwd) == set()


def test_every_case_of_a_step_is_one_line(step):
    assert list(step) == ["diffusers", "one_rank", "mesh"]
    assert [line["ranks"] for line in step.values()] == [1, 1, RANKS]
    for line in step.values():
        assert line["tokens"] == TOKENS and line["forwards_per_step"] == FORWARDS
        assert line["dtype"] == "float32" and line["median_s"] > 0 and len(line["all_s"]) == 1
    assert step["diffusers"]["ratio"] == 1 and step["one_rank"]["ratio"] > 0 and step["mesh"]["speedup"] > 0
    assert step["mesh"]["mesh"]["ulysses"] == RANKS


def test_bytes_of_a_steps_all_to_alls(step):
    """q, k, v and the output: `4 (L/P) d (P-1)/P` elements a block and forward leave each rank."""
    elements = 4 * (TOKENS // RANKS) * HEADS * HEAD_DIM * (RANKS - 1) // RANKS
    sent = step["mesh"]["bytes_sent"]
    assert [rank["all_to_all"] for rank in sent] == [elements * FP32 * BLOCKS * FORWARDS] * RANKS


@pytest.mark.parametrize("name", ["load", *in_all("load named")])
def test_each_rank_reads_what_it_keeps_and_diffusers_all(benches, name):
    lines, table, _ = benches[name]
    ours, theirs = lines
    assert [line["case"] for line in lines] == ["wan_dist", "diffusers"]
    assert theirs["ratio"] == 1 and ours["ratio"] > 0 and table.count("\n|") >= 3
    for line in lines:
        assert len(line["by_rank"]) == line["ranks"] == 2 and line["median_s"] > 0
    for rank in ours["by_rank"]:
        assert rank["bytes_read"] == rank["kept_bytes"] < ours["bytes_on_disk"]
    for rank in theirs["by_rank"]:
        assert rank["bytes_read"] == theirs["bytes_on_disk"]
    if name == "load named":  # FSDP alone divides everything
        assert sum(rank["bytes_read"] for rank in ours["by_rank"]) == ours["bytes_on_disk"]


def scale_line(lines, ranks: int, video: str) -> dict:
    (line,) = (line for line in lines if (line["ranks"], line["video"]) == (ranks, video))
    return line


@pytest.mark.parametrize(("video", "tokens"), [("480x832x81", TOKENS_480P), ("720x1280x81", TOKENS_720P)])
def test_bytes_of_a_large_world_are_the_formulas(benches, video, tokens):
    """All that rank 0 of cfg 2 x ring r x Ulysses u sends in its one forward, and the gathers of the result."""
    lines, table, _ = benches["scale"]
    assert len(lines) == 4 and table.count(video) == 2
    for ranks, ring, ulysses in ((8, 1, 4), (64, 4, 8)):
        line = scale_line(lines, ranks, video)
        assert [line["mesh"][axis] for axis in ("cfg", "ring", "ulysses", "tp")] == [2, ring, ulysses, 1]
        mine = -(-tokens // (ring * ulysses))
        others = [tokens // (ring * ulysses) + (rank < tokens % (ring * ulysses)) for rank in range(ring * ulysses)]
        heads_away = WIDTH_14B * (ulysses - 1) // ulysses
        back = sum(others[1:ulysses]) * (WIDTH_14B // ulysses)  # the result, to the tokens of the others
        assert line["bytes_sent"]["all_to_all"] == (3 * mine * heads_away + back) * BF16 * BLOCKS_14B
        groups = [sum(others[first : first + ulysses]) for first in range(0, ring * ulysses, ulysses)]
        passed = sum(groups[-step % ring] for step in range(ring - 1))  # its own part, then those that came
        assert line["bytes_sent"].get("p2p", 0) == 2 * passed * (WIDTH_14B // ulysses) * BF16 * BLOCKS_14B
        gathered = (ring * ulysses - 1) * mine * 64 * BF16 + 4 * tokens * 16 * BF16  # tokens, then the cfg halves
        assert line["bytes_sent"]["all_gather"] == gathered
        assert line["parameter_bytes"] > 0 and line["activation_bytes"] > tokens * WIDTH_14B * BF16
        assert line["predicted_s"]["total"] >= max(line["predicted_s"][part] for part in ("linear", "attention")) > 0
        assert line["crosses_nodes"]["all_to_all"] is False


@all_only
def test_sharded_weights_of_a_large_world(benches):
    ((line,), _, _) = benches["scale sharded"]
    mesh = line["mesh"]
    assert (mesh["cfg"], mesh["ulysses"], mesh["tp"], mesh["fsdp"]) == (2, 4, 2, True)
    shards = 2 * 4 // 2
    gathers = line["bytes_sent"]["fsdp_all_gather"] / ((shards - 1) * line["parameter_bytes"])
    assert 1 <= gathers < 1.01  # tables of one row are padded to the number of shards
    mine = TOKENS_480P // 4
    # Out of both attentions and the feed-forward; the norms of q and k, in fp32 and for the text's k once a prompt.
    reduced = mine * (3 * WIDTH_14B * BF16 + 3 * FP32) + 512 * FP32
    assert line["bytes_sent"]["all_reduce"] == 2 * (2 - 1) * reduced // 2 * BLOCKS_14B


def test_every_case_of_the_vae_and_what_the_last_rank_sends_more(benches):
    """Halos and keys go both ways alike; the frames go to the first rank alone, a byte a sample."""
    lines, table, _ = benches["vae"]
    assert [(line["work"], line["case"]) for line in lines] == [
        (work, case) for work in ("decode", "encode") for case in ("diffusers", "one_rank", "mesh")
    ]
    assert table.count("\n|") >= 7
    for line in lines:
        ranks = RANKS if line["case"] == "mesh" else 1
        assert len(line["by_rank"]) == ranks and line["median_s"] > 0 and line["ranks"] == RANKS
        assert all((rank["bytes_sent"] > 0) == (ranks > 1) and rank["peak_host_bytes"] > 0 for rank in line["by_rank"])
        assert line["over_diffusers"] > 0 and (line["over_one_rank"] == 1) == (line["case"] == "one_rank")
    first, last = (rank["bytes_sent"] for rank in lines[2]["by_rank"])
    frames = 4 * (LATENT_FRAMES - 1) + 1
    assert last - first == frames * LATENT_ROWS * STRIDE * LATENT_COLUMNS * STRIDE * 3


def test_blocks_that_stay_and_branches_that_share_a_visit_save_copies(benches):
    """The command itself compares every output with the resident one's, bit for bit."""
    lines, table, _ = benches["offload"]
    found = {line["case"]: line for line in lines}
    streamed = {f"prefetch_{depth}": STREAMED_BLOCKS for depth in (1, 2, 4)}
    for share, stay in (("quarter", STREAMED_BLOCKS // 4), ("half", STREAMED_BLOCKS // 2)):
        streamed[f"prefetch_1_{share}_resident"] = STREAMED_BLOCKS - stay
    streamed["prefetch_1_serial_guidance"] = 2 * STREAMED_BLOCKS
    copies = {case: line["copies"] for case, line in found.items()}
    assert copies == {"resident": 0, "group_offload": None, **streamed, "resident_again": 0}
    assert table.count("\n|") >= len(lines) + 1
    whole, block = found["resident"]["device_weight_bytes"], found["prefetch_1"]["host_bytes"] // STREAMED_BLOCKS
    for line in (found[case] for case in streamed):
        assert line["median_s"] > 0 and line["over_resident"] > 0 and line["over_group_offload"] > 0
        assert line["copied_bytes"] == line["copies"] * block and line["late"] == 0
        assert line["host_bytes"] == (STREAMED_BLOCKS - line["resident_blocks"]) * block
        assert line["device_weight_bytes"] == whole - line["host_bytes"] + (line["prefetch"] + 1) * block
        of_a_gpu = ("hidden", "predicted_s", "predicted_hidden", "planned_prefetch", "peak_device_bytes")
        assert {line[key] for key in of_a_gpu} == {None} and line["pinned"] is False


def test_meaning_is_read_on_one_rank_and_on_the_mesh(benches):
    lines, table, _ = benches["meaning"]
    assert [(line["case"], line["ranks"], line["scenes"]) for line in lines] == [
        ("one_rank", 1, SCENES),
        ("mesh", RANKS, SCENES),
    ]
    for line in lines:
        shares = [line[question] for question in ("colour", "shape", "direction", "background", "present", "all")]
        assert all(share in (0, 0.5, 1) for share in shares) and line["background"] == line["present"] == 1
        assert len(line["missed"]) == SCENES * (1 - line["all"])
    assert lines[1]["largest_difference"]["latents"] <= 1e-4 and lines[1]["largest_difference"]["frames"] <= 1
    assert "largest difference: latents" in table and "step 1/" not in table


def test_saving_states_is_measured_in_pairs_of_turns(benches):
    """The last state of a turn is always written; it holds the latents and what UniPC remembers, in fp32."""
    lines, table, _ = benches["state"]
    found = {line["case"]: line for line in lines}
    assert list(found) == ["without", "with"] and table.count("\n|") >= 3
    assert [len(line["turns"]) for line in lines] == [3, 3] and all(line["median_s"] > 0 for line in lines)
    assert found["without"]["written"] == 0 and 0.25 <= found["with"]["written"] <= 1
    latents = 16 * STATE_ROWS * 2 * FP32
    for turn in found["with"]["turns"]:
        assert 1 <= turn["written"] <= 4 and 3 * latents < turn["state_bytes"] < 5 * latents + 8192
    assert found["with"]["ratio"] > 0 and found["with"]["total_ratio"] > 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [("offload", "parallelism.ulysses=2"), ("offload", "runtime.ranks=2"), ("state", "parallelism.ulysses=2")],
)
def test_what_is_measured_on_one_rank(kind, words, tmp_path):
    done = wan_dist("task=bench", f"bench={kind}", words, cwd=tmp_path)
    assert done.returncode == 2 and f"{words}: bench={kind} takes one rank" in done.stderr
    assert files_in(tmp_path) == set()
