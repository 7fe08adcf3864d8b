"""What loading costs a rank: it reads the bytes that it owns and no others, and never holds much more than it keeps."""

import ctypes
import gc
import json
import os
import threading
from collections import Counter
from math import prod

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from support.ranks import run_cases, run_ranks
from support.sharded import SMALL, image_branch, load, local, match, mesh_of, save_transformer
from wan_dist.models.wan_transformer import meta_transformer
from wan_dist.output.memory import anonymous_bytes

MB = 1 << 20
LARGE = {**SMALL, "num_attention_heads": 40, "ffn_dim": 4096, "num_layers": 4, "text_dim": 512}  # 70 M parameters


class CountedReads:
    """Counts what `os.preadv` delivers, while it is entered."""

    def __enter__(self) -> "CountedReads":
        self.bytes, self._preadv = 0, os.preadv

        def counted(*args):
            count = self._preadv(*args)
            self.bytes += count
            return count

        os.preadv = counted
        return self

    def __exit__(self, *_) -> None:
        os.preadv = self._preadv


class Peak:
    """The growth of anonymous memory, at its highest, while it is entered."""

    def __enter__(self) -> "Peak":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free already, but still resident, would hide the growth
        self._done = threading.Event()
        self._base = self._highest = anonymous_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._highest = max(self._highest, anonymous_bytes())

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self.growth = max(self._highest, anonymous_bytes()) - self._base


def cost(env, folder, dtype, degrees, fsdp) -> dict[str, int]:
    with mesh_of(env, **degrees) as mesh:
        weights, said = match(mesh, folder, dtype), Counter()
        with CountedReads() as reads, Peak() as peak:
            model = load(mesh, weights, fsdp=fsdp, bytes_read=said)
        mine = [local(parameter) for parameter in model.parameters()]
        return {
            "said": said["it"],
            "counted": reads.bytes,
            "elements": sum(tensor.numel() for tensor in mine),
            "kept": sum(tensor.numel() * tensor.element_size() for tensor in mine),
            "largest_slice": max(tensor.numel() * 4 for tensor in mine),
            "peak": peak.growth,
        }


CASES = [
    (torch.float32, {"ring": 2}, True),
    (torch.float32, {"ring": 2}, False),
    (torch.float32, {"tp": 2}, True),
    (torch.float32, {"ring": 3}, True),
    (torch.float32, {"tp": 3}, False),
    (torch.float32, {"tp": 2, "ulysses": 2}, True),
    (torch.bfloat16, {"tp": 2, "ulysses": 2}, True),
    (torch.float32, {"cfg": 2, "ring": 2, "replicas": 2}, True),
]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_reads_what_it_owns(tmp_path, ranks):
    folder = save_transformer(tmp_path / "transformer", **image_branch(6), ffn_dim=100)
    cases = [case for case in CASES if prod(d for axis, d in case[1].items() if axis != "replicas") == ranks]
    results = run_cases(ranks, cost, [(folder, *case) for case in cases])
    file_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for case, by_rank in zip(cases, results, strict=True):
        for rank in by_rank:
            assert rank["said"] == rank["counted"] == 4 * rank["elements"], case  # fp32 on disk
            assert case[0] is torch.bfloat16 or rank["said"] == rank["kept"], case
            assert rank["said"] < file_bytes
        if case[2] and case[1].get("tp", 1) == 1 and "replicas" not in case[1]:
            assert sum(rank["elements"] for rank in by_rank) * 4 <= file_bytes  # together they read it once


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A transformer of some 300 MB, of zeros: three files and an index, as published ones have."""
    folder = tmp_path_factory.mktemp("large")
    WanTransformer3DModel.from_config(SMALL)  # warm what building a first model takes
    model = meta_transformer(LARGE)
    model.save_config(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weight_map = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(shapes)}
    for file in sorted(set(weight_map.values())):
        save_file({name: torch.zeros(shapes[name]) for name in shapes if weight_map[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["ring", "tp"])
def test_a_rank_holds_little_more_than_it_keeps(large, axis, dtype):
    for rank in run_ranks(2, cost, large, dtype, {axis: 2}, True):
        assert 250 * MB < 2 * 4 * rank["elements"] < 350 * MB
        assert rank["said"] == rank["counted"] == 4 * rank["elements"]
        assert dtype is torch.bfloat16 or rank["said"] <= 1.05 * rank["kept"] + MB
        assert 0.9 * rank["kept"] <= rank["peak"] <= rank["kept"] + rank["largest_slice"] + 64 * MB, rank
