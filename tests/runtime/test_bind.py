"""What the tensors of a plan are in memory."""

from dataclasses import dataclass, field

import torch

from ingot.artifacts.plan import Arg, Entry, Value, Variant
from ingot.runtime.bind import bind, tickets

CPU = torch.device("cpu")


@dataclass
class Recorded:
    """A kernel that remembers what it was bound to."""

    args: list = field(default_factory=list)

    def bind(self, args, grid):
        self.args.append(args)
        return lambda: None


def test_all_entries_draw_their_tickets_from_one_memory_of_zeros():
    x = Value("x", "float32", ({"T": 1},), "arena")
    few, many = Value("a.tickets", "int32", (3,), "tickets"), Value("b.tickets", "int32", ({"T": 2},), "tickets")

    def entry(drawn: Value) -> Entry:
        return Entry(drawn.name, "ingot.linear", "triton", (Arg(value="x"), Arg(value=drawn.name)), ("x", drawn.name), "kernel")

    small = Variant("forward", "small", 2, 2, 1, 2, (), (x, few), (entry(few),), ("x",), 8)
    large = Variant("forward", "large", 8, 8, 8, 8, (), (x, few, many), (entry(few), entry(many)), ("x",), 32)
    roots = tickets([small, large], CPU)
    (memory,) = roots.values()
    assert memory.tolist() == [0] * 16
    kernel = Recorded()
    for variant, tokens in ((small, 2), (large, 5)):
        bind(variant, {"T": tokens}, roots, torch.zeros(32, dtype=torch.uint8), {"kernel": kernel}, CPU).run()
    drawn = [args[1] for args in kernel.args]
    assert [t.shape for t in drawn] == [(3,), (3,), (10,)]
    assert {t.data_ptr() for t in drawn} == {memory.data_ptr()}
    assert tickets([Variant("forward", "v", 8, 8, 8, 8, (), (x,), (), ("x",), 32)], CPU).popitem()[1].numel() == 0
