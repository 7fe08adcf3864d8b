"""A fault that one rank meets is the same error on all of them, soon, and not a wait for one that is gone."""

import contextlib
import errno
import os
import shutil
import time

import pytest
import torch
import torch.distributed as dist

from support.ranks import frozen, generate, run_cases, run_generation, run_ranks, text_encoder_divided
from support.sharded import mesh_of
from support.tiers import in_all
from wan_dist.distributed.collectives import PeerLostError, all_reduce, pass_on
from wan_dist.loading.tensor_files import CheckpointError, RemoteCheckpointError
from wan_dist.loading.weights import on_every_rank

FSDP = {"parallelism.fsdp.enabled": "on"}


def read_with_one_bad_rank(env, bad: int) -> str:
    with mesh_of(env, ulysses=env.world_size) as mesh:

        def read() -> str:
            if env.rank == bad:
                raise CheckpointError("shard 2: tensor 'a' is cut short")
            return "read"

        assert on_every_rank(mesh.world, lambda: "fine") == "fine"
        with pytest.raises(CheckpointError) as caught:
            on_every_rank(mesh.world, read)
        return str(caught.value)


def test_all_ranks_raise_it():
    for answers in run_cases(3, read_with_one_bad_rank, [(0,), (2,)]):
        assert answers == ["shard 2: tensor 'a' is cut short"] * 3


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer/tokenizer.json", "{"),
        ("text_encoder/config.json", '{"model_type": "umt5", "d_model": "wide"}'),
        ("vae/config.json", '{"_class_name": "AutoencoderKLWan", "latents_mean": [0.5]}'),
    ],
)
def test_a_file_that_a_library_cannot_use_is_named(tmp_path, tiny, file, text):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / file).write_text(text)
    with pytest.raises(AssertionError) as caught:
        generate(tmp_path, broken, **{"output.formats": ["frames"], "parallelism.ulysses": 2})
    assert f"CheckpointError: {broken / file.split('/')[0]}: cannot be used" in str(caught.value)


def preadv_that_fails(component: str, ends: bool):
    """`os.preadv` that gives half of the fourth thing that is read of `component`, and then an I/O error, or (`ends`)
    nothing, as at the end of a file."""
    preadv, reads = os.preadv, 0

    def failing(fd: int, buffers: list, offset: int) -> int:
        nonlocal reads
        if f"/{component}/" in os.readlink(f"/proc/self/fd/{fd}"):
            reads += 1
            if reads == 4:
                return preadv(fd, [buffers[0][: len(buffers[0]) // 2]], offset)
            if reads > 4:
                if ends:
                    return 0
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    return failing


def generate_with_one_bad_disk(env, config, bad: int, component: str, ends: bool) -> tuple[type, str, float]:
    """What `generate` raises where reading `component` fails on one rank alone, and after how many seconds."""
    with pytest.MonkeyPatch.context() as patch:
        if env.rank == bad:
            patch.setattr(os, "preadv", preadv_that_fails(component, ends))
        start = time.monotonic()
        divided = component == "text_encoder" and config.parallelism.fsdp.enabled == "on"
        with text_encoder_divided() if divided else contextlib.nullcontext(), pytest.raises(CheckpointError) as caught:
            run_generation(env, config)
        took = time.monotonic() - start
    dist.destroy_process_group()
    return type(caught.value), str(caught.value), took


RING_AND_TP, ULYSSES = {"ring": 2, "tp": 2}, {"ulysses": 3}


@pytest.mark.parametrize(
    ("degrees", "sharding"), [(RING_AND_TP, {}), (ULYSSES, FSDP), *in_all((RING_AND_TP, FSDP), (ULYSSES, {}))]
)
def test_a_disk_that_fails_one_rank(tmp_path, tiny, degrees, sharding):
    axes = {f"parallelism.{axis}": degree for axis, degree in degrees.items()}
    config = frozen(tmp_path, tiny, **{"parallelism.cfg": 1, **axes, **sharding})
    ranks = int(config.runtime.ranks)
    components = ["transformer", *(["text_encoder"] if sharding else [])]
    cases = [
        (config, bad, component, ends) for component in components for bad, ends in ((0, False), (ranks - 1, True))
    ]
    for (_, bad, component, ends), answers in zip(
        cases, run_cases(ranks, generate_with_one_bad_disk, cases), strict=True
    ):
        said = {message for _, message, _ in answers}
        assert len(said) == 1, said
        message = said.pop()
        assert ("ends in the middle of tensor" if ends else "Input/output error") in message
        assert f"{tiny / component}" in message, message
        kinds = [RemoteCheckpointError] * ranks
        kinds[bad] = CheckpointError
        assert [kind for kind, _, _ in answers] == kinds
        assert max(took for _, _, took in answers) < 15


def lost_rank(env, bad: int) -> None:
    with mesh_of(env, ring=env.world_size) as mesh:
        if env.rank == bad:
            os._exit(1)
        on_every_rank(mesh.world, lambda: None)


def test_a_rank_that_is_gone_is_no_fault_of_the_checkpoint():
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, lost_rank, 1)
    assert "PeerLostError: gather_objects over axis 'world' failed" in str(caught.value)


class Left(Exception):  # noqa: N818
    """Leaves a process group without waiting for the others."""


def waits_for_nobody(env) -> float:
    """Seconds until a rank learns that its neighbour in an axis does not answer; 0 for those that do not."""
    waited = 0.0
    with contextlib.suppress(Left), mesh_of(env, ring=2, tp=2, timeout_s=2) as mesh:
        if env.rank in (1, 2):
            time.sleep(5)
        else:
            begin = time.monotonic()
            with pytest.raises(PeerLostError):
                if env.rank == 0:
                    all_reduce(mesh["tp"], torch.ones(4))
                else:
                    pass_on(mesh["ring"], torch.ones(4), torch.empty(4))()
            waited = time.monotonic() - begin
        raise Left
    return waited


def test_the_timeout_is_that_of_every_axis_not_of_the_world_alone():
    first, _, _, last = run_ranks(4, waits_for_nobody)
    assert 1.5 < first < 4.5 and 1.5 < last < 4.5
