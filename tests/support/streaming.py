"""Models with streamed blocks in one process, loaded by the pipeline's own function; and a GPU's streams and events
without one."""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.sharded import CPU
from wan_dist.distributed.mesh import AXES, Axis, Mesh, build_mesh
from wan_dist.loading.weights import MatchedWeights, match_weights, serve_in
from wan_dist.models.random_weights import randomise
from wan_dist.offload.layerwise import LayerwiseStream
from wan_dist.offload.slots import SlotRing
from wan_dist.pipeline.streaming import load_streamed
from wan_dist.planning.footprint import Machine
from wan_dist.planning.streaming import Streaming

BLOCKS = 6  # of a stack
ALONE = build_mesh(dict.fromkeys(AXES, 1), "cpu")


class Block(torch.nn.Module):
    """Weights of several shapes: `linear` and `norm` of its own, a scalar."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        self.norm1 = torch.nn.LayerNorm(width)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x.to(self.norm1.weight.dtype)).to(self.linear.weight.dtype)
        return x + self.scale * torch.tanh(self.linear(normed))


class Stack(torch.nn.Module):
    """Runs those of its blocks that `order` names, then a layer that is not streamed."""

    def __init__(self, blocks: int = BLOCKS, width: int = 24) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(blocks))
        self.out = torch.nn.Linear(width, width)
        self.order: Sequence[int] = range(blocks)

    def forward(self, x: torch.Tensor, order: Sequence[int] | None = None) -> torch.Tensor:
        for number in self.order if order is None else order:
            x = self.blocks[number](x)
        return self.out(x)


def whole_stack(seed: int = 0, **config: int) -> Stack:
    """All of it in memory."""
    stack = Stack(**config)
    randomise(stack, seed)
    return stack.requires_grad_(False)


def save_stack(folder: Path, seed: int = 0, **config: int) -> Path:
    folder.mkdir()
    save_file(whole_stack(seed, **config).state_dict(), folder / "model.safetensors")
    return folder


def match_stack(folder: Path, dtype: torch.dtype = torch.float32, **config: int) -> MatchedWeights:
    """The stack that was saved with that config, nothing read; its norms stay fp32."""
    with torch.device("meta"):
        stack = Stack(**config).requires_grad_(False)
    serve_in(stack, dtype, ["norm1"])
    return match_weights(stack, folder)


@dataclass
class Streamed:
    """stream: None where no block is streamed."""

    model: Any
    stream: Any
    bytes_read: int = 0

    @property
    def ring(self) -> SlotRing:
        return self.stream.ring

    @property
    def host(self) -> Any:
        return self.stream._host


def stream_all(
    matched: Mapping[str, MatchedWeights],
    *,
    prefetch: int = 1,
    resident: int = 0,
    mesh: Mesh = ALONE,
    axis: Axis | None = None,
    key: Hashable = None,
    block_list: str = "blocks",
    released: Callable[[torch.nn.Module], None] | None = None,
) -> dict[str, Streamed]:
    """Models on one ring, by name. axis: the mesh's world where it is not given."""
    read: Counter[str] = Counter()
    machine = Machine("cpu", None, None, local_ranks=mesh.world.size)
    run: Any = SimpleNamespace(
        device=CPU, mesh=mesh, plan=SimpleNamespace(machine=machine), report=SimpleNamespace(bytes_read=read)
    )
    blocks = max(len(weights.module.get_submodule(block_list)) for weights in matched.values())
    loaded = load_streamed(
        run,
        matched,
        Streaming(prefetch, resident, blocks),
        block_list=block_list,
        axis=axis or mesh.world,
        key=key,
        released=released,
    )
    return {name: Streamed(model, stream, read[name]) for name, (model, stream) in loaded.items()}


def stream_one(weights: MatchedWeights, **how: Any) -> Streamed:
    return stream_all({"it": weights}, **how)["it"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_within(tensor: torch.Tensor, memory: torch.Tensor) -> bool:
    """Whether a tensor's elements all lie in that memory. (One without elements has no address.)"""
    if tensor.numel() == 0:
        return True
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
    return memory.data_ptr() <= begin and end <= memory.data_ptr() + memory.numel() * memory.element_size()


def assert_real(streamed: Streamed, state: Mapping[str, torch.Tensor]) -> None:
    """The model shows `state`, and its streamed blocks show it from host memory."""
    shown = streamed.model.state_dict()
    assert shown.keys() == state.keys()
    for name, tensor in state.items():
        assert (shown[name].dtype, shown[name].shape, shown[name].device) == (tensor.dtype, tensor.shape, CPU), name
        assert torch.equal(shown[name], tensor), name
    if isinstance(streamed.stream, LayerwiseStream):
        for block in streamed.stream._blocks:
            assert all(is_within(parameter, streamed.host.memory) for parameter in block.parameters())


def requests(count: int = 3) -> list[torch.Tensor]:
    return [noise(5, 24, seed=seed) for seed in range(count)]


def assert_right(it: Streamed, *, whole=None, order=None, state=None) -> None:
    """Two requests, and the state behind each."""
    whole = whole or whole_stack()
    for x in requests(2):
        assert torch.equal(it.model(x, order), whole(x, order))
        assert_real(it, whole.state_dict() if state is None else state)


class FailureError(Exception):
    """What `failing` makes a model raise."""


def failing(model, where: str, times: int = 1, skip: int = 0) -> None:
    """The model fails `times` times at block 2, once it was passed there `skip` times."""
    calls = Counter()
    block = model.blocks[2]

    def fail(*_args):
        calls["all"] += 1
        if skip < calls["all"] <= skip + times:
            raise FailureError

    register = {
        "inside, before": block.linear.register_forward_pre_hook,
        "inside, behind": block.linear.register_forward_hook,
        "before": block.register_forward_pre_hook,
        "before all": partial(block.register_forward_pre_hook, prepend=True),
        "behind": block.register_forward_hook,
        "behind at once": partial(block.register_forward_hook, prepend=True),
    }[where]
    register(fail)


FAILING_WHERE = ["inside, before", "inside, behind", "before", "before all", "behind", "behind at once"]


@dataclass(eq=False)
class FakeStream:
    """clock: how far each stream had come, by name, when the latest operation here may begin."""

    name: str
    clock: Counter[str] = field(default_factory=Counter)
    synchronized: int = 0

    def wait_event(self, event: "FakeEvent") -> None:
        self.clock |= event.clock

    def synchronize(self) -> None:
        self.synchronized += 1


@dataclass(frozen=True)
class Touch:
    """One operation's use of one memory. number: of the operation on its stream; clock: what came before it."""

    kind: str
    stream: str
    number: int
    clock: Counter[str]
    is_blocking: bool = False

    def is_before(self, other: "Touch") -> bool:
        return other.clock[self.stream] >= self.number


class FakeGpu:
    """Stands in for `torch` where memory, streams and events are asked of it: the memory is the CPU's, and nothing runs
    at another time, but it is known what a GPU would be free to run at the same time.

    touches: of each memory that was allocated here, in the order in which the host queued them.
    """

    def __init__(self) -> None:
        self.touches: dict[int, list[Touch]] = defaultdict(list)
        self.copy_streams: list[FakeStream] = []
        self._default = FakeStream("default")
        self._here = threading.local()  # the current stream is a thread's own
        self._memory: list[torch.Tensor] = []
        self.cuda = SimpleNamespace(
            Stream=self._new_stream,
            Event=lambda: FakeEvent(self),
            stream=self.stream,
            current_stream=lambda _device=None: self.current,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @property
    def current(self) -> FakeStream:
        return getattr(self._here, "stream", self._default)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._here.stream = self.current, stream
        yield
        self._here.stream = before

    def empty(self, *shape: Any, device: Any = None, **how: Any) -> torch.Tensor:
        memory = torch.zeros(*shape, **how)
        self._memory.append(memory)
        self._touch(memory, "allocation")
        return memory

    def running(self) -> TorchDispatchMode:
        """Within it, what this thread computes with the memory is noted."""
        return _Noting(self)

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        returned = [result.alias_info for result in function._schema.returns]
        if any(alias is not None and not alias.is_write for alias in returned):
            return  # a view
        is_copy = function is torch.ops.aten.copy_.default
        waits = is_copy and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._touch(tensor, "write" if is_copy and tensor is args[0] else "read", waits)

    def _touch(self, tensor: torch.Tensor, kind: str, is_blocking: bool = False) -> None:
        address = tensor.untyped_storage().data_ptr()
        if any(memory.untyped_storage().data_ptr() == address for memory in self._memory):
            stream = self.current
            stream.clock[stream.name] += 1
            clock = Counter(stream.clock)
            self.touches[address].append(Touch(kind, stream.name, clock[stream.name], clock, is_blocking))

    def _new_stream(self, _device: Any = None) -> FakeStream:
        self.copy_streams.append(FakeStream(f"copies {len(self.copy_streams)}"))
        return self.copy_streams[-1]


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.clock: Counter[str] = Counter()

    def record(self, stream: FakeStream | None = None) -> None:
        self.clock = Counter((stream or self._gpu.current).clock)


class _Noting(TorchDispatchMode):
    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._gpu.note(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))
