"""A reason why a configuration cannot run, and the error that carries all of them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """One reason: the key and value as the user would type them, what is wrong with it, and what to do instead."""

    key: str
    value: Any
    why: str
    remedy: str

    def __str__(self) -> str:
        shown = "null" if self.value is None else str(self.value)
        return f"{self.key}={shown}: {self.why}; {self.remedy}"


class RefusedError(ValueError):
    """The configuration cannot run; `refusals` holds every reason."""

    def __init__(self, refusals: list[Refusal]) -> None:
        self.refusals = refusals
        count = "1 reason" if len(refusals) == 1 else f"{len(refusals)} reasons"
        lines = [f"  {refusal}" for refusal in refusals]
        super().__init__("\n".join([f"this configuration cannot run ({count}):", *lines]))

    def __reduce__(self) -> tuple[Any, ...]:
        return RefusedError, (self.refusals,)
