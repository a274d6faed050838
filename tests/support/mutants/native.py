"""Mutants of the native library: its kernels, its merges and updates, and passes in one call."""

from mutants.layer import EQUIVALENCE, LARGE_MEAN, ONE_BATCH
from mutants.planting import Edited, Mutant

NATIVE, BACKENDS = "syncbn/norm/native", "tests/norm/backends"
KERNELS = f"{NATIVE}/kernels"
EVERY_CUT = f"{BACKENDS}/test_cpu_kernels.py::test_every_cut_counts_each_value_once"
EVERY_FUSION = f"{BACKENDS}/test_cpu_kernels.py::test_every_fusion_is_as_exact_as_its_parts"

PASSES: list[Mutant] = [
    Edited(
        "no reduction in backward: native code in one call",
        ONE_BATCH,
        exchange="shared",
        file=f"{NATIVE}/passes.cpp",
        function="finish",
        before="sums[i] += row[i];",
        after="sums[i] += 0 * row[i];",
    ),
    Edited(
        "weight and bias gradients of all ranks: native code in one call",
        ONE_BATCH,
        exchange="shared",
        file=f"{NATIVE}/passes.cpp",
        function="finish",
        before="pass.fill_backward(all, sums.data());",
        after="pass.fill_backward(all, sums.data()); "
        "if (args.own) std::copy(sums.begin(), sums.end(), (A*)args.own);",
    ),
    Edited(
        "per-rank variances averaged: native code",
        ONE_BATCH,
        file=f"{NATIVE}/statistics.h",
        function="merge",
        before="+ count(rank) * delta * delta",
        after="+ 0 * delta",
    ),
    Edited(
        "mean of means with unequal counts: native code",
        ONE_BATCH,
        file=f"{NATIVE}/statistics.h",
        function="merge",
        before="count(rank) / (total > 1 ? total : 1) * packed",
        after="1 / double(ranks) * packed",
    ),
    Edited(
        "Bessel's correction with one rank's count: native code",
        ONE_BATCH,
        file=f"{NATIVE}/statistics.h",
        function="update",
        before="total / (total - 1)",
        after="total / (total - 2)",
    ),
    Edited(
        "momentum applied once a rank: native code",
        ONE_BATCH,
        file=f"{NATIVE}/statistics.h",
        function="update",
        before=": running.momentum;",
        after=": 1 - (1 - running.momentum) * (1 - running.momentum);",
    ),
    Edited(
        "num_batches_tracked not counted: native code",
        ONE_BATCH,
        file=f"{NATIVE}/statistics.h",
        function="update",
        before="++*running.tracked",
        after="*running.tracked += 0",
    ),
    Edited(
        "an empty batch counted: native code",
        f"{BACKENDS}/test_kernels.py::test_running_statistics_move",
        file=f"{NATIVE}/statistics.h",
        function="update",
        before="if (!(total > 0)) return;",
        after="",
    ),
    Edited(
        "a value that is not finite taken for a statistic: native code",
        "tests/norm/comm/test_disagreement.py::test_a_value_that_is_not_finite_on_one_rank_is_named_on_all",
        file=f"{NATIVE}/passes.cpp",
        function="check_and_update",
        before="return NOT_FINITE;",
        after="break;",
    ),
    Edited(
        "one value per channel accepted: native code",
        f"{EQUIVALENCE}::test_one_value_in_total_is_refused_on_every_rank",
        file=f"{NATIVE}/passes.cpp",
        function="check_and_update",
        before="return ONE_VALUE;",
        after=";",
    ),
]

ARITHMETIC: list[Mutant] = [
    Edited(
        "deviations from 0",
        LARGE_MEAN,
        file=f"{KERNELS}/reductions.h",
        function="add_block",
        before="sample_mean(op.x + first_of(block.row_begin, c), length)",
        after="A(0)",
    ),
    Edited(
        "the tail of a row not written",
        EVERY_CUT,
        file=f"{KERNELS}/elementwise.h",
        function="map_row",
        before="if (i < end) store(out + end - lanes, op(k, end - lanes));",
        after="",
    ),
    Edited(
        "blocks merged without their distance",
        EVERY_CUT,
        file=f"{KERNELS}/reductions.h",
        function="add",
        before="+ delta * delta * count * share",
        after="",
    ),
    Edited(
        "the last columns taken one off",
        EVERY_CUT,
        file=f"{KERNELS}/reductions.h",
        function="column",
        before=": end - lanes;",
        after=": end - lanes - 1;",
    ),
    Edited(
        "relu's derivative forgotten",
        EVERY_FUSION,
        file=f"{KERNELS}/activations.h",
        function="before_act",
        before="case syncbn::RELU: return z > 0 ? dy : Piece{};",
        after="case syncbn::RELU: return dy;",
    ),
    Edited(
        "a residual forgotten",
        EVERY_FUSION,
        file=f"{KERNELS}/operations.h",
        function="z",
        before="z = z + load(extra + i);",
        after="",
    ),
]

MUTANTS: list[Mutant] = [*PASSES, *ARITHMETIC]
