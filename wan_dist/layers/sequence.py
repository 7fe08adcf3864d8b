"""Splitting a sequence (tokens, heads, rows) over an axis: unevenly and exactly, never padded."""


def split_sizes(length: int, parts: int) -> list[int]:
    """Lengths of the parts of `torch.tensor_split`: the first `length % parts` are one longer; some may be 0.

    >>> split_sizes(10, 4)
    [3, 3, 2, 2]
    """
    base, longer = divmod(length, parts)
    return [base + (part < longer) for part in range(parts)]


def split_range(length: int, parts: int, part: int) -> tuple[int, int]:
    """`(begin, end)` of one part of `split_sizes`."""
    base, longer = divmod(length, parts)
    begin = part * base + min(part, longer)
    return begin, begin + base + (part < longer)
