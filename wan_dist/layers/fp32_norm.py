"""Layer norm in fp32 whose parameters are cast once, not once per call.

diffusers' `FP32LayerNorm` casts weight and bias at every call. Where they are fp32 already (Wan's own norms are kept
so) there is nothing to cast and nothing is kept. A cache of the cast can be stale in many ways; each is checked below.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm as DiffusersFP32LayerNorm


class FP32LayerNorm(DiffusersFP32LayerNorm):
    """diffusers' `FP32LayerNorm`, bitwise, with fp32 copies of its parameters kept between calls without gradients."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().forward(inputs)
        weight, bias = self._fp32("weight"), self._fp32("bias")
        return F.layer_norm(inputs.float(), self.normalized_shape, weight, bias, self.eps).to(inputs.dtype)

    def _fp32(self, name: str) -> torch.Tensor | None:
        source = getattr(self, name)
        if source is None or source.dtype == torch.float32:
            return source
        casts: dict[str, _Cast] = self.__dict__.setdefault("_casts", {})
        if name not in casts or not casts[name].is_of(source):
            casts[name] = _Cast.of(source)
        return casts[name].copy

    def _apply(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        self.__dict__.pop("_casts", None)  # `.cpu()` must not leave copies behind on the device
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_casts"}


def keep_fp32_parameters(model: torch.nn.Module) -> None:
    """Teach every `FP32LayerNorm` of diffusers in `model`, in place."""
    for module in model.modules():
        if type(module) is DiffusersFP32LayerNorm:
            module.__class__ = FP32LayerNorm


@dataclass(frozen=True)
class _Cast:
    """An fp32 copy and what it was made from.

    `alias` shares the source's storage and keeps it alive, so that nobody else's memory can come to lie at its
    address; `version` counts in-place changes. A write through `.data` shows in neither: on a CPU the `values`
    themselves are compared, which on other devices would wait for the device at every call.
    """

    source: torch.nn.Parameter
    alias: torch.Tensor
    version: int | None
    values: torch.Tensor | None
    copy: torch.Tensor

    @classmethod
    def of(cls, source: torch.nn.Parameter) -> "_Cast":
        alias = source.detach()
        values = alias.clone() if source.device.type == "cpu" else None
        return cls(source, alias, _version(source), values, alias.float())

    def is_of(self, source: torch.nn.Parameter) -> bool:
        """Whether the copy still is what casting `source` would give."""
        if source is not self.source or _place(source) != _place(self.alias) or _version(source) != self.version:
            return False
        if self.values is not None:
            return torch.equal(source.detach(), self.values)
        return self.version is not None


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()._cdata
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset(), storage


def _version(tensor: torch.Tensor) -> int | None:
    """The count of in-place changes; None for a tensor made under inference_mode, which has none."""
    return None if tensor.is_inference() else tensor._version
