"""The run record has the keys that users were promised, for one rank and for several."""

import json
from collections import Counter

import pytest
import torch

from wan_dist import __version__
from wan_dist.config.schema import Config
from wan_dist.output.record import RankReport, write_record
from wan_dist.topology import RankEnv

KEYS = {
    "version", "commit", "config", "request", "mesh", "checkpoint", "libraries", "attention", "plan", "phases", "steps",
    "outputs", "ranks",
}  # fmt: skip
RANK_KEYS = {
    "rank", "host", "device", "peak_device_bytes", "peak_host_bytes", "base_host_bytes", "bytes_read", "bytes_sent",
}  # fmt: skip
REQUEST_KEYS = {
    "prompt", "negative_prompt",
    "image",
    "last_image",
    "latents", "name", "steps", "guidance_scale", "guidance_scale_2", "flow_shift", "solver", "seed",
    "boundary_ratio", "height", "width", "num_frames", "fps",
}  # fmt: skip


@pytest.fixture
def report() -> RankReport:
    made = RankReport(RankEnv(3, 1, 4, 2, 1, "run", "node7"), torch.device("cpu"))
    made.bytes_read["vae"] += 7
    return made


def record(folder, report: RankReport, config: Config) -> dict:
    target = folder / "video.json"
    write_record(
        target,
        config,
        fingerprint="f00",
        plan=[{"component": "vae", "placement": "resident", "reason": "it fits"}],
        report=report,
        outputs={"mp4": "video.mp4"},
        ranks=[report.as_dict(Counter(all_to_all=5))],
    )
    assert [path.name for path in folder.iterdir()] == ["video.json"]
    return json.loads(target.read_text(encoding="utf-8"))


def test_keys(tmp_path, report):
    config = Config(prompt="猫 ${x}\n'\"")
    config.parallelism.cfg, config.parallelism.ulysses, config.model.path = 2, 4, "/models/wan"
    found = record(tmp_path, report, config)
    assert set(found) == KEYS
    assert set(found["request"]) == REQUEST_KEYS
    assert (found["version"], found["config"]["prompt"], found["request"]["prompt"]) == (
        __version__,
        *[config.prompt] * 2,
    )
    assert found["request"]["negative_prompt"] == ""
    assert found["mesh"] == {"dp": None, "cfg": 2, "ring": None, "ulysses": 4, "tp": None}
    assert found["checkpoint"] == {"path": "/models/wan", "fingerprint": "f00"}
    assert {"python", "torch", "diffusers", "transformers"} <= set(found["libraries"])
    assert found["outputs"] == {"mp4": "video.mp4"}


def test_a_ranks_entry(tmp_path, report):
    (entry,) = record(tmp_path, report, Config())["ranks"]
    assert set(entry) == RANK_KEYS
    assert (entry["rank"], entry["host"], entry["device"], entry["peak_device_bytes"]) == (3, "node7", "cpu", None)
    assert (entry["bytes_read"], entry["bytes_sent"]) == ({"vae": 7}, {"all_to_all": 5})
    assert entry["peak_host_bytes"] >= entry["base_host_bytes"] > 0


def test_a_path_that_is_not_utf8_is_no_reason_to_lose_the_record(tmp_path, report):
    config = Config()
    config.output.dir = "/data/caf\udce9"
    assert record(tmp_path, report, config)["config"]["output"]["dir"] == "/data/caf\udce9"


def test_phases_add_up(report):
    for _ in range(2):
        with report.timed("load"):
            pass
    with report.timed("decode"):
        pass
    assert list(report.phases) == ["load", "decode"]
    assert all(seconds >= 0 for seconds in report.phases.values())
    assert report.phase == "decode"


def test_the_peak_of_host_memory_sees_what_was_allocated(report):
    before = report.as_dict(Counter())["peak_host_bytes"]
    block = bytearray(b"x" * (64 << 20))
    during = report.as_dict(Counter())["peak_host_bytes"]
    del block
    after = report.as_dict(Counter())["peak_host_bytes"]
    assert during - before > 48 << 20
    assert after >= during
