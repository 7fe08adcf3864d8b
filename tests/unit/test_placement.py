"""The placement policy, as a table over published checkpoints: where each component lives, and that orders are kept."""

from dataclasses import replace
from itertools import product

import pytest

from support.plans import GB, config_of, cpu, degrees_of, gpu, hows, placed, work
from wan_dist.loading.published import published
from wan_dist.planning.footprint import DECODE, DENOISE, ENCODE_IMAGES, ENCODE_TEXT
from wan_dist.planning.placement import TO_SPARE, DoesNotFitError, Orders, Plan, fits, order_refusals, place
from wan_dist.planning.workload import Task, work_of

R, C, L, F = "resident", "component", "layerwise", "fsdp"
EIGHT = {"cfg": 2, "ulysses": 4}

# name -> (model, video, how the work differs, the machine, orders) and (text encoder, transformers, VAE, experts leave)
POLICY = {
    "14b on 24": (("14b", "720p", {}, gpu(24), {}), (C, L, R, False)),
    "14b on 48: transformers make room": (("14b", "720p", {}, gpu(48), {}), (C, R, R, True)),
    "14b 480p on 48": (("14b", "480p", {}, gpu(48), {}), (C, R, R, False)),
    "14b on 80": (("14b", "720p", {}, gpu(80), {}), (R, R, R, False)),
    "a14b on 24": (("a14b", "720p", {}, gpu(24), {}), (C, L, R, False)),
    "a14b on 48": (("a14b", "720p", {}, gpu(48), {}), (C, L, R, False)),
    "a14b on 80": (("a14b", "720p", {}, gpu(80), {}), (C, R, R, True)),
    "a14b on 141": (("a14b", "720p", {}, gpu(141), {}), (R, R, R, False)),
    "14b, tp 2, on 24: nothing to shard over": (
        ("14b", "720p", {"tp": 2}, gpu(24, local_ranks=2), {}), (C, L, R, False)
    ),
    "14b, tp 2, on 40": (("14b", "720p", {"tp": 2}, gpu(40, local_ranks=2), {}), (R, R, R, False)),
    "1.3b on 8: the VAE in bf16": (("1.3b", "480p", {"vae": "bfloat16"}, gpu(8), {}), (L, R, C, True)),
    "1.3b on 28": (("1.3b", "480p", {}, gpu(28), {}), (R, R, R, False)),
    "a14b on eight of 24": (("a14b", "720p", EIGHT, gpu(24, local_ranks=8), {}), (C, F, R, False)),
    "a14b on eight of 24, FSDP off": (
        ("a14b", "720p", {**EIGHT, "fsdp": "off"}, gpu(24, local_ranks=8), {"fsdp": "off"}), (C, L, R, False)
    ),
    "14b on eight of 141, FSDP on": (
        ("14b", "720p", {**EIGHT, "fsdp": "on"}, gpu(141, local_ranks=8), {"fsdp": "on"}), (R, F, R, False)
    ),
    "a text encoder that does not fit by itself is sharded with the rest": (
        ("14b", "720p", EIGHT, gpu(11, local_ranks=8), {}), (F, F, C, False)
    ),
    "few steps on 48: an expert at a time": (
        ("a14b", "720p", {"steps": 4, "guided": False}, gpu(48), {}), (C, C, R, False)
    ),
    "few steps on four of 24": (
        ("14b", "720p", {"steps": 8, "guided": False, "ulysses": 4}, gpu(24, local_ranks=4), {}), (C, F, R, False)
    ),
    "nine steps are many": (("14b", "720p", {"steps": 9, "guided": False}, gpu(24), {}), (C, L, R, False)),
    "guided steps are many": (("14b", "720p", {"steps": 4}, gpu(24), {}), (C, L, R, False)),
    "few steps, streamed by order": (
        ("14b", "720p", {"steps": 4, "guided": False}, gpu(24), {"transformer": L}), (C, L, R, False)
    ),
    "few steps, memory": (
        ("14b", "720p", {"steps": 4, "guided": False}, gpu(24), {"mode": "memory"}), (C, L, C, False)
    ),
    "speed spares nothing": (("a14b", "720p", {}, gpu(80), {"mode": "speed"}), (C, R, R, False)),
    "speed takes an expert at a time": (("a14b", "720p", {}, gpu(48), {"mode": "speed"}), (C, C, R, False)),
    "speed shards": (("a14b", "720p", EIGHT, gpu(24, local_ranks=8), {"mode": "speed"}), (C, F, R, False)),
    "speed streams what fits in no other way": (("14b", "720p", {}, gpu(24), {"mode": "speed"}), (C, L, R, False)),
    "memory streams what would fit": (("1.3b", "480p", {}, gpu(141), {"mode": "memory"}), (C, L, C, False)),
    "memory streams beside ranks": (
        ("14b", "720p", EIGHT, gpu(141, local_ranks=8), {"mode": "memory"}), (C, L, C, False)
    ),
    "memory, FSDP ordered": (
        ("14b", "720p", {**EIGHT, "fsdp": "on"}, gpu(141, local_ranks=8), {"mode": "memory", "fsdp": "on"}),
        (C, F, C, False),
    ),
    "manual decides nothing": (("a14b", "720p", {}, gpu(141), {"mode": "manual"}), (R, R, R, False)),
    "manual does not shard": (
        ("a14b", "720p", EIGHT, gpu(141, local_ranks=8), {"mode": "manual"}), (R, R, R, False)
    ),
    "no limit is known": (("a14b", "720p", {}, replace(gpu(1), device_bytes=None), {}), (R, R, R, False)),
}  # fmt: skip


@pytest.mark.parametrize("case", POLICY)
def test_policy(case):
    (model, video, differs, machine, orders), (text, transformers, vae, leave) = POLICY[case]
    plan = placed(work(model, video, **differs), machine, **orders)
    found = hows(plan)
    assert {found[name] for name in found if name.startswith("transformer")} == {transformers}
    assert (found["text_encoder"], found["vae"], plan.experts_leave) == (text, vae, leave)
    assert fits(plan.footprint, machine, 0.0 if orders.get("mode") == "speed" else TO_SPARE)
    assert plan.warnings == ()
    if transformers == L:
        streaming = plan.streaming("transformer")
        assert (streaming.prefetch, streaming.resident_blocks) == (2 if model == "a14b" else 1, 0)
        assert streaming.hidden == 1.0


@pytest.mark.parametrize(
    ("case", "differs", "machine", "orders"),
    [
        ("1.3b", {"vae": "float32"}, gpu(8), {}),  # of which its fp32 VAE is too much
        ("14b", {"steps": 4, "guided": False}, gpu(24), {}),  # streaming is the user's to order
        ("a14b", {}, gpu(80), {"mode": "manual"}),
        ("a14b", {}, gpu(24, host=40), {}),  # 56.2 GB of blocks, of which some have room on the device
        ("14b", {}, gpu(24, host=14), {"transformer": L}),
        ("14b", {}, gpu(24, host=28), {"transformer": L, "resident_blocks": 0}),
        ("14b", {"tp": 2}, gpu(16, host=14, local_ranks=2), {}),
        ("14b", {}, gpu(24), {"transformer": R}),
        ("14b", {}, gpu(10), {"text_encoder": C}),
        ("a14b", {}, gpu(48), {"mode": "speed", "transformer": R}),
        ("14b", {}, cpu(30), {}),
        ("14b", {}, cpu(30), {"mode": "memory"}),
    ],
)
def test_nothing_that_is_allowed_fits(case, differs, machine, orders):
    video = "480p" if case == "1.3b" else "720p"
    with pytest.raises(DoesNotFitError) as caught:
        placed(work(case, video, device=machine.device, **differs), machine, **orders)
    assert not fits(caught.value.footprint, machine, 0.0)


def test_the_image_encoder_leaves_with_the_text_encoder():
    kept, leaves = placed(work("i2v 14b"), gpu(80)), placed(work("i2v 14b"), gpu(48))
    assert (kept.how("text_encoder"), kept.how("image_encoder")) == (R, R)
    assert (leaves.how("text_encoder"), leaves.how("image_encoder")) == (C, C)
    assert list(kept.footprint.device) == [ENCODE_TEXT, ENCODE_IMAGES, DENOISE, DECODE]
    assert placed(work("i2v a14b"), gpu(24)).how("image_encoder") is None


ORDERED = [
    *product(["transformer"], [R, C, L]), *product(["text_encoder", "image_encoder"], [R, C, L]), ("vae", R), ("vae", C)
]  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "speed", "memory", "manual"])
@pytest.mark.parametrize(("key", "order"), ORDERED)
def test_an_order_is_obeyed_in_every_mode(mode, key, order):
    """Where there is room for it, and where there is barely any; and it moves nothing else that there is room for."""
    for machine in (gpu(300), gpu(44), gpu(24)):
        try:
            plan = placed(work("i2v 14b"), machine, mode=mode, **{key: order})
        except DoesNotFitError:
            assert machine.device_bytes < 300 * GB
            continue
        assert plan.how(key) == order
        if machine.device_bytes == 300 * GB:
            others = {name: how for name, how in hows(plan).items() if name != key}
            assert others == {name: how for name, how in hows(placed(work("i2v 14b"), machine, mode=mode)).items()
                              if name != key}  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "speed", "memory", "manual"])
@pytest.mark.parametrize("video", ["720p", "short"])
@pytest.mark.parametrize(("prefetch", "resident_blocks"), [(1, 3), (3, 0), (0, 40), (4, 40)])
def test_numbers_that_are_ordered_stay(mode, video, prefetch, resident_blocks):
    for model, differs in (("14b", {}), ("a14b", {}), ("14b", EIGHT)):
        plan = placed(
            work(model, video, **differs),
            gpu(300),
            mode=mode,
            transformer=L,
            prefetch=prefetch,
            resident_blocks=resident_blocks,
        )
        streaming = plan.streaming("transformer")
        assert (streaming.prefetch, streaming.resident_blocks) == (prefetch, resident_blocks)
        assert "prefetch=" not in plan.placements[1].reason


@pytest.mark.parametrize("mode", ["auto", "speed", "memory", "manual"])
def test_fsdp_is_ordered_or_not(mode):
    machine = gpu(300, local_ranks=8)
    on = placed(work("a14b", fsdp="on", **EIGHT), machine, mode=mode, fsdp="on")
    assert (on.how("transformer"), on.how("transformer_2")) == (F, F)
    for gigabytes in (24, 300):
        try:
            off = placed(work("a14b", fsdp="off", **EIGHT), gpu(gigabytes, local_ranks=8), mode=mode, fsdp="off")
        except DoesNotFitError:
            assert mode == "manual"
            continue
        assert F not in hows(off).values()


def test_manual_streams_plainly():
    streaming = placed(work("a14b", "short"), gpu(141), mode="manual", transformer=L).streaming("transformer_2")
    assert (streaming.prefetch, streaming.resident_blocks) == (1, 0)


def test_contradictions_come_all_at_once():
    orders = Orders(transformer=L, vae=L, image_encoder=L, fsdp="on", resident_blocks=41)
    refusals = order_refusals(orders, blocks={"transformer": 40, "text_encoder": 24})
    assert [refusal.key for refusal in refusals] == [
        "offload.vae", "offload.image_encoder", "offload.transformer", "offload.resident_blocks"
    ]  # fmt: skip
    assert "use 0 to 40" in refusals[-1].remedy


@pytest.mark.parametrize("order", [R, C, L])
def test_fsdp_and_another_place_are_two_orders_for_the_same_weights(order):
    (refusal,) = order_refusals(Orders(transformer=order, fsdp="on"), blocks={"transformer": 40})
    assert (refusal.key, refusal.value) == ("offload.transformer", order)
    for fine in (Orders(transformer=order, fsdp="off"), Orders(text_encoder=order, fsdp="on"), Orders(fsdp="on")):
        assert order_refusals(fine, blocks={"transformer": 40}) == []


def test_neither_the_vae_nor_the_image_encoder_is_ever_streamed():
    for gigabytes, mode in product(range(6, 60, 3), ["auto", "speed", "memory"]):
        try:
            found = hows(placed(work("i2v 14b", vae="bfloat16"), gpu(gigabytes), mode=mode))
        except DoesNotFitError:
            continue
        assert found["vae"] != L and found["image_encoder"] != L


FRUGALITY = {R: 0, F: 1, C: 2, L: 3}


def frugality(plan: Plan) -> tuple:
    """How much comes and goes: transformers first, then what else; blocks that stay count against it."""
    streaming = plan.streaming("transformer")
    return (
        FRUGALITY[plan.how("transformer")],
        -streaming.resident_blocks if streaming else 0,
        plan.experts_leave,
        FRUGALITY[plan.how("text_encoder")],
        FRUGALITY[plan.how("vae")],
    )


@pytest.mark.parametrize("mode", ["auto", "speed", "memory"])
@pytest.mark.parametrize(
    ("model", "video", "differs", "host"),
    [
        ("14b", "720p", {}, None),
        ("14b", "720p", {"cfg": 2}, None),
        ("14b", "short", {}, None),
        ("14b", "720p", {"tp": 2}, 60),
        ("a14b", "720p", {}, 60),  # of which streaming takes 56.2
        ("a14b", "480p", {"tp": 2}, 60),
        ("5b", "5b", {"cfg": 2}, None),
    ],
)
def test_more_device_memory_never_gives_a_more_frugal_plan(mode, model, video, differs, host):
    local_ranks, before = max([1, *differs.values()]), None
    for half_gigabytes in [*range(12, 60), *range(60, 200, 4)]:
        machine = gpu(half_gigabytes / 2, host=host, local_ranks=local_ranks)
        try:
            plan = placed(work(model, video, **differs), machine, mode=mode)
        except DoesNotFitError:
            assert before is None, "what ran on less"
            continue
        assert fits(plan.footprint, machine, 0.0)
        after = frugality(plan)
        assert before is None or after <= before, (half_gigabytes / 2, before, after)
        before = after
    assert before is not None


def test_what_barely_fits_is_the_leanest_and_a_warning():
    plan = placed(work("1.3b", "480p"), gpu(9))  # of which the VAE takes 8.4, whatever else is done
    assert plan.how("transformer") == R and plan.experts_leave
    (warning,) = plan.warnings
    assert "less than a tenth" in warning and "8.36 of 9 GB" in warning
    (warning,) = placed(work("14b"), gpu(24, host=30), resident_blocks=0).warnings
    assert "28.1 of 30 GB" in warning  # it is the host's memory that is short


def test_blocks_for_which_the_host_lacks_room_stay_on_the_device():
    plan, machine = placed(work("14b"), gpu(24, host=30)), gpu(24, host=30)
    assert plan.streaming("transformer").resident_blocks == 2 and plan.warnings == ()
    assert fits(plan.footprint, machine, TO_SPARE)
    assert placed(work("14b"), gpu(24, host=64)).streaming("transformer").resident_blocks == 0


def test_the_host_must_hold_what_is_streamed():
    plan = placed(work("a14b"), gpu(24, host=64))
    assert plan.how("transformer") == L
    assert plan.footprint.peak_node == pytest.approx(2 * 40 * 0.7029e9, rel=0.01)
    one, two = (placed(work("14b", tp=tp), gpu(24, local_ranks=tp)) for tp in (1, 2))
    assert one.footprint.peak_node == pytest.approx(two.footprint.peak_node, rel=0.01)  # one copy a tp rank, of half
    eight = placed(work("14b", fsdp="off", **EIGHT), gpu(24, local_ranks=8), fsdp="off")
    assert eight.footprint.peak_node == pytest.approx(one.footprint.peak_node, rel=0.01)  # one copy a node


def test_on_a_cpu_the_node_is_the_room():
    """All its ranks together, of which one has the encoders; and one copy of streamed blocks."""
    todo = work("1.3b", "480p", device="cpu", dtype="float32", ulysses=4)
    plan = placed(todo, cpu(141, local_ranks=4))
    rank, node = plan.footprint.rank[DENOISE], plan.footprint.node[DENOISE]
    assert node == rank + 3 * (rank - todo.weights["text_encoder"].total)
    assert set(hows(plan).values()) == {R}
    assert hows(placed(todo, cpu(40, local_ranks=4), fsdp="off"))["text_encoder"] == C
    streamed = placed(todo, cpu(141, local_ranks=4), transformer=L, text_encoder=C)
    blocks = sum(todo.weights["transformer"].blocks)
    assert streamed.footprint.node[DENOISE] == 4 * streamed.footprint.rank[DENOISE] + blocks
    assert streamed.streaming("transformer").copy_s is None  # nothing overlaps there
    for gigabytes in range(20, 141, 10):
        try:
            plan = placed(todo, cpu(gigabytes, local_ranks=4))
        except DoesNotFitError:
            continue
        assert plan.footprint.peak_node <= gigabytes * GB


def test_weights_count_as_they_are_served():
    """Published files are in fp32; what is planned is bf16."""
    config, checkpoint = config_of("14b"), published("Wan-AI/Wan2.1-T2V-14B-Diffusers")
    task = Task.of_request(config, checkpoint, guided=True)
    todo = work_of(config, checkpoint, task, degrees=degrees_of(), device="cuda", local_ranks=1, threads=1)
    transformer = todo.weights["transformer"]
    assert transformer.file_bytes == pytest.approx(57.2e9, rel=0.01)
    assert transformer.total == pytest.approx(28.6e9, rel=0.01)
    assert transformer.blocks[0] == pytest.approx(703e6, rel=0.001)
    assert todo.weights["text_encoder"].total == pytest.approx(11.4e9, rel=0.01)
    assert placed(todo, gpu(80)).footprint.components[DENOISE]["transformer"] == transformer.total


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_an_unknown_size_counts_as_large(name):
    todo = work("14b")
    todo = replace(todo, weights={**todo.weights, name: None})
    plan = placed(todo, gpu(141))
    assert plan.how(name) == L
    assert plan.footprint.unknown == (name,)
    reason = next(p.reason for p in plan.placements if p.component == name)
    assert "unknown" in reason
    assert placed(todo, gpu(300), **{name: R}).how(name) == R  # the user may know
    assert placed(todo, replace(gpu(1), device_bytes=None)).how(name) == R


@pytest.mark.parametrize("case", POLICY)
def test_each_has_a_reason_of_one_sentence(case):
    (model, video, differs, machine, orders), _ = POLICY[case]
    plan = placed(work(model, video, **differs), machine, **orders)
    assert [p.component for p in plan.placements] == sorted(
        [p.component for p in plan.placements], key=["text_encoder", "transformer", "transformer_2", "vae"].index
    )
    for p in plan.placements:
        assert p.reason and "\n" not in p.reason and p.reason == p.reason.strip() and not p.reason.endswith(".")
    ordered = {f"offload.{key}={value}" for key, value in orders.items() if key not in ("mode", "fsdp")}
    for order in ordered:
        assert any(order in p.reason for p in plan.placements)
    if orders.get("fsdp") == "on":
        assert any("parallelism.fsdp.enabled=on" in p.reason for p in plan.placements)


def test_when_each_is_on_the_device():
    def spans(plan: Plan) -> dict[str, tuple[str, str]]:
        return {p.component: (p.first, p.last) for p in plan.placements}

    assert spans(placed(work("a14b"), gpu(141))) == {
        "text_encoder": (ENCODE_TEXT, DECODE), "transformer": (DENOISE, DECODE), "transformer_2": (DENOISE, DECODE),
        "vae": (DENOISE, DECODE),
    }  # fmt: skip
    assert spans(placed(work("i2v 14b"), gpu(48))) == {
        "text_encoder": (ENCODE_TEXT, ENCODE_TEXT), "image_encoder": (ENCODE_IMAGES, ENCODE_IMAGES),
        "transformer": (DENOISE, DENOISE), "vae": (ENCODE_IMAGES, DECODE),
    }  # fmt: skip
    assert spans(placed(work("14b"), gpu(141), mode="memory")) == {
        "text_encoder": (ENCODE_TEXT, ENCODE_TEXT), "transformer": (DENOISE, DENOISE), "vae": (DECODE, DECODE),
    }  # fmt: skip


def test_the_same_inputs_give_the_same_plan():
    plan = placed(work("a14b"), gpu(80))
    again = place(replace(work("a14b")), replace(gpu(80)), Orders())
    assert plan == again and plan.digest() == again.digest()
    others = [
        placed(work("a14b"), gpu(79.9)),
        placed(work("a14b"), gpu(80, host=100)),
        placed(work("14b"), gpu(80)),
        placed(work("a14b"), gpu(80), vae=R),
        placed(work("a14b"), gpu(80), transformer=L),
        placed(work("a14b"), gpu(80), transformer=L, prefetch=3),
    ]
    assert len({plan.digest(), *(other.digest() for other in others)}) == 1 + len(others)
