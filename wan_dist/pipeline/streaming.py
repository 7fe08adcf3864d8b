"""Loading components whose blocks are streamed: into host memory that the node's ranks share."""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from math import inf

import torch

from wan_dist.distributed.mesh import Axis
from wan_dist.loading.weights import HostTensors, MatchedWeights, fill
from wan_dist.log import logger
from wan_dist.offload.host_blocks import HostBlocks, block_layout
from wan_dist.offload.layerwise import LayerwiseStream, host_tensors, streamed_blocks
from wan_dist.offload.slots import SlotRing
from wan_dist.pipeline.run import Run
from wan_dist.planning.placement import TO_SPARE
from wan_dist.planning.streaming import Streaming


def load_streamed(
    run: Run,
    matched: Mapping[str, MatchedWeights],
    streaming: Streaming,
    *,
    block_list: str,
    axis: Axis,
    key: Hashable,
    released: Callable[[torch.nn.Module], None] | None = None,
) -> dict[str, tuple[torch.nn.Module, LayerwiseStream | None]]:
    """Models that take turns on one ring of slots, by component, each with its stream (None where every block stays on
    the device). All ranks of `axis` call this; those that give the same `key` hold the same weights."""
    blocks = {name: streamed_blocks(w.module, block_list, streaming.resident_blocks) for name, w in matched.items()}
    layouts = {name: [block_layout(block) for block in found.values()] for name, found in blocks.items()}
    budget = _pin_budget(run)
    everything = [layout for found in layouts.values() for layout in found]
    ring = SlotRing(everything, min(streaming.prefetch + 1, len(everything)), run.device)
    loaded: dict[str, tuple[torch.nn.Module, LayerwiseStream | None]] = {}
    for name, weights in matched.items():
        logger.info("loading %s, streaming %d blocks", name, len(blocks[name]))
        read = partial(fill, weights, device=run.device, axis=axis, bytes_read=run.report.bytes_read, component=name)
        if not blocks[name]:
            loaded[name] = read(), None
            continue
        host = HostBlocks(layouts[name], axis, (name, key))
        model = read(host=HostTensors(host_tensors(blocks[name], host), host.is_filler))
        if run.device.type == "cuda":
            budget -= host.pin(budget)
        loaded[name] = model, LayerwiseStream(list(blocks[name].values()), host, ring, released)
    return loaded


def _pin_budget(run: Run) -> float:
    """Bytes that this rank's copy may pin. The budget is the node's, for all its copies: pinned pages are lost to
    everyone else there, so a part of what was free must stay pageable."""
    machine = run.plan.machine
    if machine.host_bytes is None:
        return inf
    return (1 - TO_SPARE) * machine.host_bytes / min(run.mesh["tp"].size, machine.local_ranks)
