"""Which part of a checkpoint's tensor a rank owns: a `WeightLoader` on the parameter says so, as data.

A parameter without one is owned whole. The same object cuts a tensor that is in memory already, such as the delta of
an adapter that is merged later. FSDP replaces a module's parameters, so loaders are captured before it wraps anything
and are found on the module afterwards.
"""

from dataclasses import dataclass

import torch

from wan_dist.layers.wrappers import MISSING, attribute

Ranges = tuple[tuple[int, int], ...]  # (begin, end) for each dim
_CAPTURED = "_weight_loaders"


@dataclass(frozen=True)
class WeightLoader:
    """A slice of the checkpoint's tensor of shape `whole`: elements `begin` to `end` of `dim`, all of the other dims; a
    scalar is all of itself."""

    whole: tuple[int, ...]
    dim: int
    begin: int
    end: int

    def ranges(self) -> Ranges:
        return tuple((self.begin, self.end) if dim == self.dim else (0, size) for dim, size in enumerate(self.whole))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor; raises ValueError for one of another shape."""
        if tuple(tensor.shape) != self.whole:
            raise ValueError(f"a tensor of shape {tuple(tensor.shape)} where the checkpoint's is {self.whole}")
        return tensor.narrow(self.dim, self.begin, self.end - self.begin) if self.whole else tensor


def whole_loader(tensor: torch.Tensor) -> WeightLoader:
    """The default: all of it."""
    shape = tuple(tensor.shape)
    return WeightLoader(shape, 0, 0, shape[0] if shape else 1)


def capture_weight_loaders(module: torch.nn.Module) -> dict[str, WeightLoader]:
    """The loader of every parameter and buffer of `module` by qualified name; kept on the module too."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    loaders = {name: getattr(tensor, "weight_loader", None) or whole_loader(tensor) for name, tensor in tensors}
    setattr(module, _CAPTURED, loaders)
    return loaders


def weight_loader(module: torch.nn.Module, name: str) -> WeightLoader:
    """The loader of a parameter by its qualified name, whatever wraps `module` by now. Raises KeyError for a name
    that it does not have, LookupError where loaders were never captured."""
    loaders = attribute(module, _CAPTURED)
    if loaders is MISSING:
        raise LookupError(f"{type(module).__name__}: its weight loaders were not captured before it was wrapped")
    return loaders[name]
