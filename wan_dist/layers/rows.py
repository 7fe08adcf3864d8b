"""Row-independent results on the CPU: the same token gives the same bits however many tokens a rank holds.

CPU matrix products take another kernel, with another order of summation, for fewer than four rows (measured with MKL
on AVX-512 for every width tried: 1e-6 apart for 1 to 3 rows, equal bits from 4 on). A shard or a last block of
queries that small would make the video depend on the number of ranks, so such tensors get rows of zeros that no
other row ever sees and that are cut off again. GPU kernels work on fixed tiles and need none of this.
"""

import torch
import torch.nn.functional as F

_ROWS = 4


def rows_for(count: int, device: torch.device) -> int:
    """The number of rows to compute with where `count` are wanted: at least four on a CPU."""
    return max(count, _ROWS) if device.type == "cpu" else count


def pad_rows(x_BL: torch.Tensor, rows: int) -> torch.Tensor:
    """`[B, L, ...]` -> `[B, rows, ...]`, zeros at the end; contiguous."""
    short = rows - x_BL.shape[1]
    return F.pad(x_BL, (0, 0) * (x_BL.ndim - 2) + (0, short)) if short > 0 else x_BL.contiguous()


def query_rows(count: int, device: torch.device) -> int:
    """The number of query rows to attend with: a multiple of four on a CPU, whose kernel works on blocks of 32 and
    more and would leave one to three rows for the last."""
    return -(-count // _ROWS) * _ROWS if device.type == "cpu" else count
