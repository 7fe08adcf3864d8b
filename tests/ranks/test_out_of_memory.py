"""Out of memory: what is said of it, and what is kept."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from support.ranks import frozen, run_cases
from wan_dist import worker
from wan_dist.cli.overrides import check_overrides
from wan_dist.output.record import RankReport
from wan_dist.pipeline import generate as generation
from wan_dist.pipeline import video as writing
from wan_dist.stop import StopRequest


def out_of_memory(*_args, **_kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def out_of_memory_at_the_first_frame(*_args):
    yield out_of_memory()


def failing(env, config_path: str, phase: str) -> dict:
    """What `worker` records of a generation that runs out of memory in `phase`."""
    from wan_dist.config import freeze

    path = Path(config_path)
    config, report = freeze.load(path), RankReport(env, torch.device("cpu"))
    state = {"phase": "import", "config": config, "report": report, "stop": StopRequest()}
    fault = {
        "denoise": (generation, "denoise", out_of_memory),
        "decode": (writing, "decode_frames", out_of_memory_at_the_first_frame),
    }[phase]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*fault)
        try:
            generation.generate(config, env, torch.device("cpu"), report)
        except torch.OutOfMemoryError as error:
            assert worker._record_end(error, env, path, path.parent / "rank0.log", state) == 1
    return json.loads((path.parent / f"failure.rank{env.rank}.json").read_text())


@pytest.fixture(scope="module")
def failures(tmp_path_factory, tiny):
    """`{phase: (the account, the folder)}`"""
    folders = {phase: tmp_path_factory.mktemp(phase) for phase in ("denoise", "decode")}
    for folder in folders.values():
        frozen(folder, tiny, **{"parallelism.cfg": 1, "runtime.ranks": 1, "output.formats": ["mp4"]})
    cases = [(str(folder / ".run" / "video" / "config.yaml"), phase) for phase, folder in folders.items()]
    return dict(zip(folders, [(result[0], folders[case[1]]) for result, case in
                              zip(run_cases(1, failing, cases), cases, strict=True)], strict=True))  # fmt: skip


@pytest.mark.parametrize("phase", ["denoise", "decode"])
def test_running_out_says_what_was_planned_what_was_taken_and_what_to_try(failures, phase):
    account, _ = failures[phase]
    text = account["traceback"]
    assert account["phase"] == phase and "OutOfMemoryError: CUDA out of memory" in text
    assert not account["refused"] and not account["expected"]
    assert f"out of memory in phase {phase}: the plan said " in text and "GB were taken at the peak" in text
    for row in ("GB a rank", "text_encoder", "transformer", "beside the weights", "on the device"):
        assert f"    {row}" in text
    (line,) = [line for line in text.splitlines() if line.startswith("try, in order: ")]
    *overrides, ranks, smaller = line.removeprefix("try, in order: ").split("; ")
    assert overrides and check_overrides(overrides) == ([], overrides)
    assert "more ranks" in ranks and "smaller video" in smaller


def test_latents_outlive_a_decoding_that_ran_out(failures):
    account, folder = failures["decode"]
    (line,) = [line for line in account["traceback"].splitlines() if line.startswith("the latents are kept; ")]
    command = shlex.split(line.partition("alone: ")[2])
    latents = folder / "video.latents.safetensors"
    assert latents.is_file() and command[:3] == ["wan-dist", "task=decode", f"latents={latents}"]
    assert check_overrides(command[1:]) == ([], command[1:])  # test_decode.py runs one
    assert "the latents are kept" not in failures["denoise"][0]["traceback"]
