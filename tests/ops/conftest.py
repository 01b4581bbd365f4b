"""What tests of kernels share."""

from collections.abc import Callable
from typing import Any

import pytest

from ingot.ops.kernel import Call


@pytest.fixture(scope="session")
def let_go() -> Callable[[Call, dict[str, Any]], dict[str, Any]]:
    """Inputs of a call as a cache leaves them whose pages behind the window belong to others: these are NaN (of a quantized cache, their scales
    are), and the page table repeats the first page kept."""

    def let_go(call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
        caches = [n for n in ("k_cache", "v_cache", "latent_cache") if n in inputs]
        window, page_size = inputs.get("window"), inputs[caches[0]].shape[2] if caches else 0
        if not window or not page_size:
            return inputs
        table, starts = inputs["page_table"].clone(), inputs["cu_seqlens_q"].tolist()
        names = caches if inputs.get("k_scale") is None else ("k_scale", "v_scale")
        pages = {n: inputs[n].clone() for n in names}
        others = set(range(len(inputs[caches[0]])))
        for s, length in enumerate(inputs["seq_lens"].tolist()):
            first = max(0, length - (starts[s + 1] - starts[s]) - window + 1) // page_size
            table[s, :first] = table[s, first]
            others -= set(table[s, first : -(-length // page_size)].tolist())
        for state in pages.values():
            state[sorted(others)] = float("nan")
        return inputs | {"page_table": table, **pages}

    return let_go
