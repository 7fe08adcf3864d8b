"""The state on disk: whole or not at all, back as it went in, refused where it is damaged, and written aside."""

import errno
import json
import os
import random
import resource
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_dist.loading.tensor_files import CheckpointError
from wan_dist.output import files
from wan_dist.output import state as module
from wan_dist.output.identity import describe_state, read_identity, state_metadata
from wan_dist.output.state import DenoisingState, StateWriter, read_state, write_state

NASTY = "猫 🏄 \udcff ' \" \\ \n \x00 \u2028 ${x}"
SHAPE = (1, 4, 2, 3, 5)


def state(steps_done: int, shape: tuple[int, ...] = SHAPE) -> DenoisingState:
    """One whose values all say how far it got."""
    full = torch.full(shape, float(steps_done))
    tensors = {"model_outputs.1": full + 0.5, "last_sample": full - 0.5}
    numbers = {"solver": "UniPCMultistepScheduler", "_step_index": steps_done, "this_order": None}
    return DenoisingState(steps_done=steps_done, steps=1000, latents=full, tensors=tensors, numbers=numbers)


def same(one: DenoisingState, other: DenoisingState) -> bool:
    a, b = one.named(), other.named()
    return (
        (one.steps_done, one.steps, one.numbers) == (other.steps_done, other.steps, other.numbers)
        and list(a) == list(b)
        and all(torch.equal(a[name], b[name]) and a[name].stride() == b[name].stride() for name in a)
    )


@pytest.mark.parametrize("text", [NASTY, "", "x" * 300_000])
def test_a_state_comes_back_as_it_went_in(tmp_path, text):
    file = tmp_path / "it's \udcff $a.safetensors"
    identity = {"prompt": text, "sampler.seed": 2**64 - 1, "sampler.flow_shift": 0.1, "image": None}
    write_state(file, state(3), identity)
    assert same(read_state(file), state(3))
    assert read_identity(file) == identity
    described = describe_state(file)
    assert (described.steps_done, described.steps) == (3, 1000)
    assert os.listdir(tmp_path) == [file.name]


def test_the_file_is_one_that_safetensors_reads(tmp_path):
    write_state(tmp_path / "state", state(3), {"prompt": NASTY})
    loaded = load_file(tmp_path / "state")
    assert set(loaded) == {"latents", "solver.model_outputs.1", "solver.last_sample"}
    assert torch.equal(loaded["solver.last_sample"], state(3).tensors["last_sample"])


def test_memory_layouts_come_back_too(tmp_path):
    moved = torch.randn(1, 2, 3, 5, 4).permute(0, 4, 1, 2, 3)
    given = DenoisingState(steps_done=0, steps=0, latents=moved, tensors={"last_sample": moved}, numbers={})
    write_state(tmp_path / "state", given, {})
    assert same(read_state(tmp_path / "state"), given)


def damaged(file, **changes):
    """Rewrite a state's header."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    told = json.loads(header["__metadata__"]["wan_dist_state"]) | changes
    header["__metadata__"]["wan_dist_state"] = json.dumps({k: v for k, v in told.items() if v is not ...})
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": 2}, "a state of format 2; this version reads format 1"),
        ({"version": ...}, "not the saved state of a run"),
        ({"steps_done": ...}, "damaged header"),
        ({"more": 1}, "damaged header"),
        ({"steps_done": 1001}, "1001 of 1000 steps done"),
        ({"steps_done": True}, "a value of a wrong type"),
        ({"identity": []}, "a value of a wrong type"),
        ({"strides": {"latents": [120, 30, 15, 5, 1], "solver.gone": []}}, "tensor 'solver.gone' is missing"),
        ({"strides": {"latents": [120, 30, 15, 5, 1]}}, "tensor 'solver.model_outputs.1' has no strides"),
        ({"strides": {}}, "has no strides"),
    ],
)
def test_a_header_that_does_not_fit_is_named(tmp_path, changes, why):
    file = tmp_path / "a state"
    write_state(file, state(3), {})
    damaged(file, **changes)
    for read in (read_state, read_identity):
        with pytest.raises(CheckpointError) as caught:
            read(file)
        assert str(caught.value).startswith(f"{file}: ") and why in str(caught.value)


@pytest.mark.parametrize("left", [0, 7, 8, 100, -1, -500])
def test_a_truncated_file_is_named(tmp_path, left):
    file = tmp_path / "state"
    write_state(file, state(3), {})
    file.write_bytes(file.read_bytes()[:left])
    for read in (read_state, read_identity):
        with pytest.raises(CheckpointError, match=r"state: truncated"):
            read(file)


@pytest.mark.parametrize(
    ("tensors", "metadata", "why"),
    [
        ({"latents": torch.zeros(SHAPE)}, None, "not the saved state of a run"),
        ({"latents": torch.zeros(SHAPE)}, {"wan_dist_state": "{"}, "not the saved state of a run"),
        ({"latents": torch.zeros(SHAPE)}, {"wan_dist_state": "[]"}, "not the saved state of a run"),
        ({"latents": torch.zeros(SHAPE)}, {"wan_dist_state": '{"version": [1]}'}, "a state of format"),
    ],
)
def test_other_files_are_named(tmp_path, tensors, metadata, why):
    save_file(tensors, tmp_path / "x", metadata)
    with pytest.raises(CheckpointError, match=f"x: {why}"):
        read_state(tmp_path / "x")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "text").write_text("not a safetensors file, by far")
    for name, why in (("text", "not a safetensors file"), ("gone", "no such file"), (".", "Is a directory")):
        with pytest.raises(CheckpointError, match=why):
            read_state(tmp_path / name)


@pytest.mark.parametrize(
    ("tensor", "what"), [(torch.zeros(3), r"F32 of shape \(3,\)"), (torch.zeros(SHAPE, dtype=torch.float64), "F64")]
)
def test_a_dtype_or_shape_of_no_latents_is_named(tmp_path, tensor, what):
    told = {"steps_done": 1, "steps": 2, "numbers": {}, "identity": {}}
    save_file({"latents": tensor}, tmp_path / "x", state_metadata(strides={"latents": list(tensor.stride())}, **told))
    with pytest.raises(CheckpointError, match=rf"x: tensor 'latents' is {what}.*, not F32 of shape \(1, z, T, H, W\)"):
        read_state(tmp_path / "x")


def test_a_process_killed_at_any_moment_leaves_a_whole_state(tmp_path):
    file, rng, shape = tmp_path / "state", random.Random(0), (1, 16, 8, 32, 32)
    write_state(file, state(0, shape), {})
    reached = []
    for _ in range(10):
        before = file.stat().st_ino
        child = os.fork()
        if child == 0:
            try:
                for steps_done in range(1, 1000):
                    write_state(file, state(steps_done, shape), {})
            finally:
                os._exit(1)
        while file.stat().st_ino == before:  # until the child has written one
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        back = read_state(file)
        assert same(back, state(back.steps_done, shape))
        assert set(os.listdir(tmp_path)) <= {"state", "state.tmp"}
        reached.append(back.steps_done)
    assert min(reached) >= 1
    write_state(file, state(7), {})
    assert os.listdir(tmp_path) == ["state"]


@pytest.fixture
def full_disk():
    """Of this process, no file may grow past 8 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_state_and_nothing_else(tmp_path, full_disk):
    file = tmp_path / "state"
    write_state(file, state(1), {})
    with pytest.raises(OSError, match="File too large"):
        write_state(file, state(2, (1, 16, 8, 8, 8)), {})
    assert same(read_state(file), state(1))
    assert os.listdir(tmp_path) == ["state"]


def test_a_sync_that_fails_leaves_the_old_state_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "state"
    write_state(file, state(1), {})
    monkeypatch.setattr(files, "_sync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_state(file, state(2), {})
    assert same(read_state(file), state(1))
    assert os.listdir(tmp_path) == ["state"]


def no_space(*_arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_writer_writes_what_was_submitted_last(tmp_path):
    writer = StateWriter(tmp_path / "state", {"prompt": "x"})
    for steps_done in range(1, 4):
        writer.submit(state(steps_done))
        writer.flush(raise_errors=True)
        assert same(read_state(tmp_path / "state"), state(steps_done))
    writer.submit(state(9))
    writer.close(raise_errors=True)
    writer.close(raise_errors=True)
    assert same(read_state(tmp_path / "state"), state(9))
    assert read_identity(tmp_path / "state") == {"prompt": "x"}
    assert "state-writer" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that finishes a write when it is told to: `(may_finish, the steps_done that were written)`."""
    may_finish, written, real = threading.Semaphore(0), [], module._write

    def write(file, given, *rest):
        may_finish.acquire()
        written.append(given.steps_done)
        real(file, given, *rest)

    monkeypatch.setattr(module, "_write", write)
    return may_finish, written


def test_the_newest_state_replaces_the_one_that_waits(tmp_path, slow_disk):
    may_finish, written = slow_disk
    writer = StateWriter(tmp_path / "state", {})
    writer.submit(state(1))
    while writer._waiting is not None:  # until the thread has it
        time.sleep(0.0005)
    for steps_done in range(2, 50):
        writer.submit(state(steps_done))
    assert written == [] and not (tmp_path / "state").exists()
    may_finish.release(2)
    writer.close(raise_errors=True)
    assert written == [1, 49]
    assert same(read_state(tmp_path / "state"), state(49))


def test_a_writer_that_rests_writes_at_once_when_it_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_REST", 1e9)
    writer = StateWriter(tmp_path / "state", {})
    writer.submit(state(1))
    while writer._waiting is not None or writer._writing:
        time.sleep(0.0005)
    writer.submit(state(2))
    time.sleep(0.02)
    assert read_state(tmp_path / "state").steps_done == 1
    writer.close(raise_errors=True)
    assert read_state(tmp_path / "state").steps_done == 2


def test_a_failed_write_is_told_once_and_does_not_end_the_run(tmp_path, monkeypatch):
    told = []
    writer = StateWriter(tmp_path / "state", {}, told.append)
    writer.submit(state(1))
    writer.flush(raise_errors=True)
    with monkeypatch.context() as broken:
        broken.setattr(files, "_sync", no_space)
        for steps_done in (2, 3):
            writer.submit(state(steps_done))
            writer.flush()
        with pytest.raises(OSError, match="No space left"):
            writer.flush(raise_errors=True)
        assert read_state(tmp_path / "state").steps_done == 1
    assert [error.errno for error in told] == [errno.ENOSPC]
    writer.submit(state(4))
    writer.close(raise_errors=True)
    assert read_state(tmp_path / "state").steps_done == 4


def test_closing_raises_where_the_state_must_be_there(tmp_path):
    for must_be_there in (False, True):
        writer = StateWriter(tmp_path / "no such folder" / "state", {})
        writer.submit(state(1))
        if must_be_there:
            with pytest.raises(FileNotFoundError):
                writer.close(raise_errors=True)
        else:
            writer.close()
        assert not writer._thread.is_alive()


@pytest.mark.parametrize("at", ["write", "callback"])
def test_a_fault_of_ours_is_not_swallowed(tmp_path, monkeypatch, at):
    def fault(*_arguments):
        raise RuntimeError("a bug")

    if at == "write":
        monkeypatch.setattr(module, "_write", fault)
    writer = StateWriter(tmp_path / "no such folder" / "state", {}, fault)
    writer.submit(state(1))
    for ask in (writer.flush, lambda: writer.submit(state(2)), writer.close):
        with pytest.raises(RuntimeError, match="a bug"):
            ask()
    assert not writer._thread.is_alive()


def test_nothing_submitted_is_nothing_written(tmp_path):
    StateWriter(tmp_path / "state", {}).close(raise_errors=True)
    assert os.listdir(tmp_path) == []
