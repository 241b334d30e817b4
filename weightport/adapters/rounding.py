"""float64 to narrower floats, rounded once."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    """The nearest numbers of a dtype, ties to even; what is too large becomes infinite.

    ml_dtypes goes to bfloat16 by way of float32, which rounds twice. Here float32 is rounded to
    odd, which keeps on which side of a tie a number lies (Boldo and Melquiond 2008,
    https://doi.org/10.1109/TC.2007.70819).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype.name != "bfloat16":
            return x.astype(dtype)
        single = x.astype(np.float32)
        error = x - single
        bits = single.view(np.int32)
        is_even = ((bits & 1) == 0) & (error != 0) & np.isfinite(single)
        is_short = (error > 0) == (single > 0)
        bits += np.where(is_even, np.where(is_short, 1, -1), 0).astype(np.int32)
        return single.astype(dtype)
