"""What is said where memory is short: the refusal's table and remedies, advice after running out; and what a node has
free."""

from functools import cache, partial
from itertools import product

import pytest

from support.plans import VIDEOS, checkpoint_of, config_of, cpu, degrees_of, gpu, set_keys
from wan_dist.cli.overrides import check_overrides
from wan_dist.config.schema import Config
from wan_dist.planning.advice import next_to_try, out_of_memory_note, planned_note
from wan_dist.planning.footprint import Machine
from wan_dist.planning.placement import Plan
from wan_dist.planning.refusal import Refusal, RefusedError
from wan_dist.planning.room import place_or_refuse, table
from wan_dist.planning.workload import Sizes, Task, work_of
from wan_dist.topology import free_host_memory

GB, MB = 10**9, 2**20


@cache
def sizes_of(model: str, task: Task) -> Sizes:
    return Sizes(checkpoint_of(model), task)


def planned(
    config: Config,
    model: str,
    machine: Machine,
    *,
    guided: bool = True,
    **degrees,
) -> Plan:
    checkpoint = checkpoint_of(model)
    task = Task.of_request(config, checkpoint, guided=guided)
    config.parallelism.vae = "on" if max([1, *degrees.values()]) > 1 else "off"
    work_for = partial(
        work_of,
        checkpoint=checkpoint,
        task=task,
        degrees=degrees_of(**degrees),
        device=machine.device,
        local_ranks=machine.local_ranks,
        threads=1,
        sizes=sizes_of(model, task),
    )
    return place_or_refuse(config, work_for, machine)


def refusal(*args, **told) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        planned(*args, **told)
    (found,) = caught.value.refusals
    return found


LAST_RESORTS = (
    "more ranks, or a device with more memory",
    "more ranks, or more host memory",
    "fewer ranks, or more host memory",
)


def proposals(found: Refusal) -> list[list[str]]:
    first, _, _ = found.remedy.partition("\n")
    *overrides, last = first.removeprefix("try, in order: ").split("; ")
    assert last in LAST_RESORTS
    return [proposal.split() for proposal in overrides]


@cache
def is_typed_right(override: str) -> bool:
    return check_overrides([override]) == ([], [override])


RESIDENT = {"offload.transformer": "resident"}
# name -> (model, video, machine, orders, unguided few steps, degrees)
SHORT = {
    "1.3b on 8": ("1.3b", "480p", gpu(8), {}, False, {}),
    "14b resident on 24": ("14b", "720p", gpu(24), RESIDENT, False, {}),
    "14b resident on 36, FSDP possible": ("14b", "720p", gpu(30, local_ranks=8), RESIDENT, False, {"ulysses": 8}),
    "a14b manual on 80": ("a14b", "720p", gpu(80), {"offload.mode": "manual"}, False, {}),
    "a14b manual on eight of 40": (
        "a14b", "720p", gpu(40, local_ranks=8), {"offload.mode": "manual"}, False, {"cfg": 2, "ulysses": 4}
    ),
    "14b in few steps on 24": ("14b", "720p", gpu(24), {"sampler.steps": 4}, True, {}),
    "a14b on 48, little host memory": ("a14b", "480p", gpu(48, host=12), {}, False, {}),
    "14b on 16": ("14b", "720p", gpu(16), {}, False, {}),
    "14b on 3": ("14b", "720p", gpu(3), {}, False, {}),
    "text encoder resident on 12": ("5b", "5b", gpu(24), {"offload.text_encoder": "resident"}, False, {}),
    "i2v 14b, all ordered": (
        "i2v 14b", "720p", gpu(40), {f"offload.{name}": "resident" for name in ("transformer", "text_encoder", "vae")},
        False, {},
    ),
    "fsdp off on eight of 24, little host memory": (
        "14b", "720p", gpu(24, host=6, local_ranks=8), {"parallelism.fsdp.enabled": "off"}, False, {"ulysses": 8}
    ),
    "a14b, FSDP ordered, on two of 30": (
        "a14b", "720p", gpu(30, local_ranks=2), {"parallelism.fsdp.enabled": "on"}, False, {"ulysses": 2}
    ),
    "1.3b on a CPU": ("1.3b", "480p", cpu(14), {"runtime.dtype": "float32"}, False, {}),
    "1.3b on a CPU of two ranks": (
        "1.3b", "480p", cpu(30, local_ranks=2), {"runtime.dtype": "float32", "offload.mode": "manual"}, False,
        {"cfg": 2},
    ),
}  # fmt: skip


def config_for(case: str) -> Config:
    model, video, machine, orders, _, _ = SHORT[case]
    return config_of(model, video, **{"runtime.device": machine.device, **orders})


@pytest.mark.parametrize("case", SHORT)
def test_the_refusal_names_the_order_the_room_and_the_bytes(case):
    model, _, machine, orders, few, degrees = SHORT[case]
    found = refusal(config_for(case), model, machine, guided=not few, **degrees)
    ordered = [key for key in orders if key.startswith("offload.") or orders[key] == "on"]
    assert (found.key, found.value) == ((ordered[0], orders[ordered[0]]) if ordered else ("offload.mode", "auto"))
    room = machine.host_bytes if machine.device == "cpu" else machine.device_bytes
    assert "does not fit" in found.why and f"{room / GB:.3g} GB" in found.why
    assert "host memory" in found.why or machine.host_bytes is None
    head, *rows = found.remedy.split("\n")[1:]
    assert head.split() == ["GB", "a", "rank", *_phases(model)]
    names = [row.split("  ")[2].strip() for row in rows]
    assert names[-3:] == ["beside the weights", "on the device", "host memory of a node"]
    assert {"text_encoder", "transformer", "vae"} <= set(names[:-3])
    assert ("image_encoder" in names) == model.startswith("i2v 14b")


def _phases(model: str) -> list[str]:
    images = ["encode", "images"] if model.startswith("i2v") else []
    return ["encode", "text", *images, "denoise", "decode"]


@pytest.mark.parametrize("case", SHORT)
def test_every_proposal_is_typed_right_and_fits(case):
    model, _, machine, _, few, degrees = SHORT[case]
    found = proposals(refusal(config_for(case), model, machine, guided=not few, **degrees))
    assert len(found) == len({tuple(proposal) for proposal in found})
    for overrides in found:
        assert all(map(is_typed_right, overrides))
        config = config_for(case)
        values = dict(override.split("=", 1) for override in overrides)
        video = {key: int(value) for key, value in values.items() if key.startswith("video.")}
        planned(set_keys(config, **{**values, **video}), model, machine, guided=not few, **degrees)


@pytest.mark.parametrize(
    ("case", "first"),
    [
        ("1.3b on 8", "runtime.vae_dtype=bfloat16"),
        ("14b resident on 24", "offload.transformer=auto"),
        ("14b resident on 36, FSDP possible", "offload.transformer=auto"),
        ("a14b manual on 80", "offload.mode=auto"),
        ("a14b manual on eight of 40", "offload.mode=auto"),
        ("14b in few steps on 24", "offload.transformer=layerwise"),
        ("a14b on 48, little host memory", "offload.transformer=component"),
        ("14b on 16", "runtime.vae_dtype=bfloat16"),
        ("text encoder resident on 12", "offload.text_encoder=auto"),
        ("a14b, FSDP ordered, on two of 30", "parallelism.fsdp.enabled=auto"),
        ("fsdp off on eight of 24, little host memory", "parallelism.fsdp.enabled=on"),
    ],
)
def test_the_least_costly_comes_first(case, first):
    model, _, machine, _, few, degrees = SHORT[case]
    found = proposals(refusal(config_for(case), model, machine, guided=not few, **degrees))
    assert " ".join(found[0]) == first


def test_where_nothing_helps_but_another_machine():
    assert proposals(refusal(config_for("14b on 3"), "14b", gpu(1))) == []


def test_contradictions_come_before_room():
    config = config_of("14b", **{"offload.vae": "layerwise", "offload.resident_blocks": "50"})
    with pytest.raises(RefusedError) as caught:
        planned(config, "14b", gpu(1))
    assert [found.key for found in caught.value.refusals] == ["offload.vae", "offload.resident_blocks"]


def test_the_table_adds_up():
    plan = planned(config_of("i2v 14b"), "i2v 14b", gpu(80))
    lines = table(plan.footprint).split("\n")
    starts = [lines[0].index(phase) for phase in plan.footprint.device]

    def cells(line: str) -> list[float]:
        ends = [*starts[1:], None]
        return [float(line[start:end].strip() or 0) for start, end in zip(starts, ends, strict=True)]

    *parts, total, node = map(cells, lines[1:])
    assert [sum(column) for column in zip(*parts, strict=True)] == pytest.approx(total, rel=0.01)
    assert total == pytest.approx([size / GB for size in plan.footprint.device.values()], rel=0.01)
    assert node == pytest.approx([size / GB for size in plan.footprint.node.values()], rel=0.01)


ORDERS = ["resident", "component", "layerwise"]


@pytest.mark.parametrize("phase", ["check", "encode", "load", "denoise", "decode", "write"])
@pytest.mark.parametrize(
    ("model", "orders"),
    [
        ("a14b", {"offload.transformer": transformer, "offload.text_encoder": text})
        for transformer, text in product(ORDERS, ORDERS)
    ]
    + [
        ("i2v 14b", {"offload.image_encoder": "resident", "offload.vae": "component"}),
        ("14b", {"parallelism.fsdp.enabled": "on", "runtime.vae_dtype": "bfloat16"}),
        ("14b", {"offload.transformer": "layerwise", "offload.prefetch": "3", "offload.resident_blocks": "2"}),
    ],
)
def test_advice_is_typed_right_and_new(phase, model, orders):
    """And it is taken: none of it is refused together with what was ordered, nor is it what the plan does."""
    config = config_of(model, **orders)
    degrees = {"ulysses": 2} if "parallelism.fsdp.enabled" in orders else {}
    plan = planned(config, model, gpu(900, local_ranks=2 if degrees else 1), **degrees)
    *tries, ranks, smaller = next_to_try(plan, config, phase, 0)
    assert "parallelism.ulysses" in ranks and "video.height" in smaller
    assert all(map(is_typed_right, tries))
    for override in tries:
        key, _, value = override.partition("=")
        assert plan.how(key.removeprefix("offload.")) != value
        planned(set_keys(config_of(model, **orders), **{key: value}), model, gpu(900, local_ranks=2), **degrees)


@pytest.mark.parametrize("fsdp", ["auto", "on"])
def test_advice_on_one_rank(fsdp):
    """Where FSDP is ordered, another place for the same weights would be refused."""
    config = config_of("14b", **{"parallelism.fsdp.enabled": fsdp})
    tries = next_to_try(planned(config, "14b", gpu(900)), config, "denoise", 0)
    assert ("offload.transformer=layerwise" in tries) == (fsdp == "auto")


def test_advice_goes_down_one_rung_at_a_time():
    def first(phase: str, **orders: str) -> str:
        config = config_of("14b", **{f"offload.{key}": value for key, value in orders.items()})
        return next_to_try(planned(config, "14b", gpu(900)), config, phase, 0)[0]

    assert first("encode") == "offload.text_encoder=component"
    assert first("encode", text_encoder="component") == "offload.text_encoder=layerwise"
    assert first("denoise", text_encoder="component") == "offload.transformer=layerwise"
    assert first("decode", text_encoder="component") == "offload.transformer=component"
    assert first("decode", text_encoder="component", transformer="component") == "runtime.vae_dtype=bfloat16"
    streamed = {"text_encoder": "component", "transformer": "layerwise"}
    assert first("denoise", **streamed, resident_blocks="2") == "offload.resident_blocks=0"
    assert first("denoise", **streamed, prefetch="2") == "offload.prefetch=1"


def test_transformers_that_left_are_not_asked_to_leave():
    config = config_of("14b")
    plan = planned(config, "14b", gpu(48))
    assert plan.experts_leave
    assert next_to_try(plan, config, "decode", 0)[0] == "runtime.vae_dtype=bfloat16"


def test_the_notes_hold_the_table_and_what_was_measured():
    config = config_of("14b")
    plan = planned(config, "14b", gpu(80))
    note = out_of_memory_note(plan, config, "denoise", 0, 81_200_000_000)
    assert note.startswith("out of memory in phase denoise: the plan said 49.8 GB on a rank, 81.2 GB were taken")
    assert table(plan.footprint) in note and "try, in order: offload.text_encoder=component; " in note
    assert "taken" not in out_of_memory_note(plan, config, "denoise", 0, None)
    told = planned_note(plan, config)
    assert table(plan.footprint) in told and "in phase denoise, try: " in told and "in phase decode, try: " in told


V2, V1 = "0::{}\n", "5:cpu:/elsewhere\n4:memory:{}\n"


def host(root, *, available_mb: int | None = 1000, cgroup: str = ""):
    (root / "proc/self").mkdir(parents=True)
    if available_mb is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {available_mb * 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    return root


def limit(root, path: str, most, used_mb: int, cached_mb: int = 0, *, v1: bool = False, active_mb: int = 0):
    group = root / "sys/fs/cgroup" / ("memory" if v1 else ".") / path
    group.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    (group / names[0]).write_text(f"{most if isinstance(most, str) else most * MB}\n")
    (group / names[1]).write_text(f"{used_mb * MB}\n")
    total = "total_" if v1 else ""
    lines = {"anon": used_mb * MB, f"{total}inactive_file": cached_mb * MB, f"{total}active_file": active_mb * MB}
    (group / "memory.stat").write_text("".join(f"{name} {size}\n" for name, size in lines.items()))


def free_mb(root) -> float:
    return free_host_memory(root) / MB


def test_where_no_cgroup_limits_the_host_decides(tmp_path):
    assert free_mb(host(tmp_path)) == 1000
    assert free_mb(host(tmp_path / "v2", cgroup=V2.format("/"))) == 1000
    root = host(tmp_path / "max", cgroup=V2.format("/job"))
    limit(root, "job", "max", 800)
    assert free_mb(root) == 1000


@pytest.mark.parametrize("v1", [False, True])
def test_the_tightest_level_decides(tmp_path, v1):
    for tight in ("slurm", "slurm/job", "slurm/job/step"):
        root = host(tmp_path / tight.replace("/", "-"), cgroup=(V1 if v1 else V2).format("/slurm/job/step"))
        for path in ("slurm", "slurm/job", "slurm/job/step"):
            limit(root, path, 300 if path == tight else 2000, 100, v1=v1)
        limit(root, "slurm/other", 50, 40, v1=v1)
        assert free_mb(root) == 200


@pytest.mark.parametrize("v1", [False, True])
def test_the_page_cache_counts_as_free(tmp_path, v1):
    root = host(tmp_path, cgroup=(V1 if v1 else V2).format("/job"))
    limit(root, "job", 500, 450, cached_mb=150, active_mb=100, v1=v1)
    assert free_mb(root) == 300


@pytest.mark.parametrize("v1", [False, True])
def test_in_a_container_the_path_is_not_there_but_its_limit_is(tmp_path, v1):
    root = host(tmp_path, cgroup=(V1 if v1 else V2).format("/docker/0123456789abcdef"))
    limit(root, ".", 400, 100, v1=v1)
    assert free_mb(root) == 300


def test_a_limit_over_what_the_host_has_and_one_that_is_used_up(tmp_path):
    root = host(tmp_path / "large", cgroup=V2.format("/job"))
    limit(root, "job", 9000, 100)
    assert free_mb(root) == 1000
    root = host(tmp_path / "full", cgroup=V2.format("/job"))
    limit(root, "job", 300, 310)
    assert free_mb(root) == 0


def test_version_1_says_unlimited_with_a_large_number(tmp_path):
    root = host(tmp_path, cgroup=V1.format("/job"))
    limit(root, "job", str(2**63 - 4096), 100, v1=True)
    assert free_mb(root) == 1000


@pytest.mark.parametrize("damage", ["memory.max", "memory.current", "memory.stat"])
def test_files_that_cannot_be_read_are_no_limit(tmp_path, damage):
    root = host(tmp_path, cgroup=V2.format("/job"))
    limit(root, "job", 300, 100)
    (root / "sys/fs/cgroup/job" / damage).unlink()
    assert free_mb(root) == 1000


def test_a_system_that_does_not_say(tmp_path):
    assert free_host_memory(tmp_path) is None
    assert free_host_memory(host(tmp_path, available_mb=None)) is None


def test_this_machine():
    assert free_host_memory() > 100 * MB


def test_videos_that_may_be_proposed_are_smaller():
    for name, (height, width, frames) in VIDEOS.items():
        found = proposals(refusal(config_of("14b", name), "14b", gpu(4.6)))
        for override in (override for proposal in found for override in proposal if override.startswith("video.")):
            key, value = override.removeprefix("video.").split("=")
            assert int(value) <= {"height": height, "width": width, "num_frames": frames}[key]
