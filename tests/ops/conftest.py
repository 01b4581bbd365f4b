"""What tests of kernels share."""

from collections.abc import Callable
from typing import Any

import pytest

from ingot.ops.kernel import Call


@pytest.fixture(scope="session")
def let_go() -> Callable[[Call, dict[str, Any]], dict[str, Any]]:
    """Inputs of a call as a cache leaves them whose pages behind the window belong to others: these are NaN, and the page table repeats the first page kept."""

    def let_go(call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
        window, page_size = inputs.get("window"), inputs["k_cache"].shape[2] if "k_cache" in inputs else 0
        if not window:
            return inputs
        table, starts = inputs["page_table"].clone(), inputs["cu_seqlens_q"].tolist()
        k_cache, v_cache = inputs["k_cache"].clone(), inputs["v_cache"].clone()
        others = set(range(len(k_cache)))
        for s, length in enumerate(inputs["seq_lens"].tolist()):
            first = max(0, length - (starts[s + 1] - starts[s]) - window + 1) // page_size
            table[s, :first] = table[s, first]
            others -= set(table[s, first : -(-length // page_size)].tolist())
        k_cache[sorted(others)] = v_cache[sorted(others)] = float("nan")
        return inputs | {"page_table": table, "k_cache": k_cache, "v_cache": v_cache}

    return let_go
