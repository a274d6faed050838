"""Mutants of activation checkpointing: which pass a replay repeats, and what it leaves out."""

from contextlib import nullcontext
from typing import Any

from mutants.planting import Edited, Mutant, Replaced

RECOMPUTE, TESTS = "syncbn.norm.ops.recompute", "tests/norm/ops"
TRAINS = f"{TESTS}/test_recompute.py::test_ranks_train_as_without_checkpointing"
ONCE = "tests/norm/test_wrapped.py"


def counts_again(original: Any) -> Any:
    def forward_pass(args: Any, backend: Any, call: Any, needs_grad: Any) -> Any:
        from syncbn.norm.backends.aten import update

        y, stats = original(args, backend, call, needs_grad)
        if call.checkpointed is not None and call.checkpointed.replaying and args.running:
            update(args.running, stats)
        return y, stats

    return forward_pass


MUTANTS: list[Mutant] = [
    Replaced(
        "a replayed pass exchanges again",
        f"{ONCE}::test_a_checkpointed_pass_neither_exchanges_nor_counts_again",
        aim=f"{RECOMPUTE}.Pass.known",
        by=lambda original: lambda self, channels: None,
    ),
    Replaced(
        "a replayed pass counts again",
        f"{ONCE}::test_reentrant_checkpointing_counts_once",
        aim="syncbn.norm.ops.autograd.forward_pass",
        by=counts_again,
    ),
    Replaced(
        "a replay of torch's own pass counts again",
        f"{TESTS}/test_recompute.py::test_one_process_trains_as_without_checkpointing[non_reentrant-None]",
        aim=f"{RECOMPUTE}.unchanged",
        by=lambda original: lambda *buffers: nullcontext(),
    ),
    Edited(
        "a replay of a compiled pass counts again",
        f"{TESTS}/test_recompute_compiled.py::test_checkpointing_around_a_compiled_block[2-ranks-non_reentrant]",
        file="syncbn/norm/ops/custom_op.py",
        function="_forward",
        before="if replaying else",
        after="if False else",
    ),
    Replaced(
        "the compiler exchanges again in a replay",
        f"{TESTS}/test_recompute_compiled.py::test_a_compiled_function_with_a_checkpoint_inside_exchanges_no_more",
        aim="syncbn.norm.ops.custom_op._keep_in_graph",
        by=lambda original: lambda: None,
    ),
    Edited(
        "the pass before the one that a replay repeats",
        f"{TRAINS}[2-ranks-non_reentrant-False-True-shared]",
        file="syncbn/norm/ops/recompute.py",
        function="_next",
        before="return records[position]",
        after="return records[position - 1]",
    ),
    Replaced(
        "regions of non-reentrant checkpointing ignored",
        f"{TRAINS}[2-ranks-non_reentrant-False-True-shared]",
        aim=f"{RECOMPUTE}._region_of",
        by=lambda original: lambda pack: (None, False),
    ),
    Replaced(
        "regions of reentrant checkpointing ignored",
        f"{TRAINS}[2-ranks-reentrant-False-True-shared]",
        aim=f"{RECOMPUTE}._in_functions",
        by=lambda original: lambda frame: ([], None),
    ),
    Replaced(
        "a pass recorded in the innermost region alone",
        f"{TRAINS}[2-ranks-megatron_in_non_reentrant-False-True-shared]",
        aim=f"{RECOMPUTE}.Pass.__init__",
        by=lambda original: lambda self, repeated, records: original(self, repeated, records[:1]),
    ),
    Replaced(
        "operations of a pass counted by selective checkpointing",
        f"{TRAINS}[2-ranks-selective_save_all-False-True-shared]",
        aim=f"{RECOMPUTE}.unobserved",
        by=lambda original: lambda: nullcontext(),
    ),
]
