"""Row-independent results on the CPU: the same token gives the same bits however many tokens a rank holds.

CPU matrix products take another kernel, with another order of summation, for fewer than four rows (measured with MKL
on AVX-512 for every width tried: 1e-6 apart for 1 to 3 rows, equal bits from 4 on). A shard or a last block of
queries that small would make the video depend on the number of ranks, so such tensors get rows of zeros that no
other row ever sees and that are cut off again. Likewise the activation: its last elements, too few for a vector, are
computed another way (GELU: 1e-7 apart), so rows are added until the elements fill whole vectors on every thread. The
widths of the published models do that by themselves. GPU kernels work on fixed tiles and need none of this.
"""

import torch
import torch.nn.functional as F

from wan_dist.layers.cpu_rows import ROWS, cpu_rows


def rows_for(count: int, width: int, device: torch.device) -> int:
    """The number of rows to compute with where `count` are wanted and the activation is `width` wide: see `cpu_rows`;
    on other devices as many as are wanted."""
    return cpu_rows(count, width) if device.type == "cpu" else count


def pad_rows(x_BL: torch.Tensor, rows: int) -> torch.Tensor:
    """`[B, L, ...]` -> `[B, rows, ...]`, zeros at the end; contiguous."""
    short = rows - x_BL.shape[1]
    return F.pad(x_BL, (0, 0) * (x_BL.ndim - 2) + (0, short)) if short > 0 else x_BL.contiguous()


def query_rows(count: int, device: torch.device) -> int:
    """The number of query rows to attend with: a multiple of four on a CPU, whose kernel works on blocks of 32 and
    more and would leave one to three rows for the last."""
    return -(-count // ROWS) * ROWS if device.type == "cpu" else count
