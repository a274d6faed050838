"""Errors that synchronised batch norms have had, or could have: a change of one file, and the test that sees it."""

from dataclasses import dataclass

DIST, UNIT, NORM = "tests/dist", "tests/unit", "syncbn/norm"
COMM = "tests/norm/comm"
EQUIVALENCE = f"{DIST}/test_equivalence.py"
ONE_BATCH = f"{EQUIVALENCE}::test_any_split_matches_one_big_batch_in_float64[2-ranks-4d]"
LARGE_MEAN = f"{EQUIVALENCE}::test_float32_stays_within_its_bound_even_at_a_large_mean[2-ranks-100.0-0.01-0.001]"
TRAINING = f"{DIST}/test_train_on_ranks.py::test_synchronised_ranks_train_as_one_process_on_the_whole_batch"
EVERY_CUT = f"{UNIT}/test_cpu_kernels.py::test_every_cut_counts_each_value_once"


@dataclass(frozen=True)
class Mutant:
    """A change of one file, and the test that must fail with it; `kernels` as in SYNCBN_KERNELS."""

    what: str
    file: str
    before: str
    after: str
    test: str
    kernels: str = ""


LAYER = [
    Mutant(
        "no reduction in backward",
        f"{NORM}/ops/collectives.py",
        "return call.exchange.gather_sums(sums, call.fingerprint(x, needs_grad=True))",
        "return sums.view(1, -1)",
        ONE_BATCH,
        "eager",
    ),
    Mutant(
        "no reduction in backward, in one call",
        f"{NORM}/native/whole.cpp",
        "sums[i] += row[i];",
        "sums[i] += 0 * row[i];",
        ONE_BATCH,
    ),
    Mutant(
        "per-rank variances averaged",
        f"{NORM}/moments.py",
        "M2 = (M2s + weights * (means - mean) ** 2).sum(0)",
        "M2 = (M2s / weights.clamp(min=1)).mean(0) * total",
        ONE_BATCH,
        "eager",
    ),
    Mutant(
        "mean of means with unequal counts",
        f"{NORM}/moments.py",
        "mean = (weights * means).sum(0) / total.clamp(min=1)",
        "mean = means.mean(0)",
        ONE_BATCH,
        "eager",
    ),
    Mutant(
        "Bessel's correction with one rank's count",
        f"{NORM}/kernels/eager.py",
        "statistics.var * (total / (total - 1).clamp(min=1))",
        "statistics.var * (total / 2 / (total / 2 - 1).clamp(min=1))",
        ONE_BATCH,
        "eager",
    ),
    Mutant(
        "gradients summed where DDP averages",
        "syncbn/train/loop.py",
        "(share * state.runtime.world_size).backward()",
        "(share * state.runtime.world_size**2).backward()",
        TRAINING,
    ),
    Mutant(
        "E[x^2] - E[x]^2 in float32",
        f"{NORM}/kernels/eager.py",
        "deviations.square_().sum(_reduced(x))",
        "x.square().sum(_reduced(x)) - count * mean.square()",
        LARGE_MEAN,
        "eager",
    ),
    Mutant(
        "momentum applied once a rank",
        f"{NORM}/kernels/eager.py",
        "factor = seen * running.momentum",
        "factor = seen * (1 - (1 - running.momentum) ** 2)",
        ONE_BATCH,
        "eager",
    ),
    Mutant(
        "evaluation still exchanges",
        f"{NORM}/module.py",
        "        if self.training:\n",
        "        if True:\n",
        f"{EQUIVALENCE}::test_evaluation_communicates_nothing",
    ),
    Mutant(
        "uneven losses unweighted",
        "syncbn/train/loop.py",
        'reduction="sum") / global_batch',
        'reduction="mean") / state.runtime.world_size',
        f"{TRAINING}[2-ranks-uneven last batches]",
    ),
    Mutant(
        "weight and bias gradients reduced twice",
        f"{NORM}/autograd.py",
        "return dx, half.sums",
        "return dx, sums_over_ranks(half.sums, x, call)",
        ONE_BATCH,
        "eager",
    ),
    Mutant(
        "weight and bias gradients reduced twice, in one call",
        f"{NORM}/native/whole.cpp",
        "run<A>(whole.call, sums.data(), whole.call.result);",
        "run<A>(whole.call, std::copy(sums.begin(), sums.end(), (A*)whole.own) - count, whole.call.result);",
        ONE_BATCH,
    ),
    Mutant(
        "process_group ignored",
        f"{NORM}/module.py",
        "group = resolve(self.process_group)",
        "group = resolve(None)",
        f"{COMM}/test_groups.py::test_statistics_are_shared_within_the_group_alone",
    ),
    Mutant(
        "num_batches_tracked not counted",
        f"{NORM}/kernels/eager.py",
        "running.num_batches_tracked.add_(seen.to(running.num_batches_tracked.dtype))",
        "pass",
        ONE_BATCH,
        "eager",
    ),
    Mutant(
        "an empty batch counted",
        f"{NORM}/kernels/eager.py",
        "seen = (total > 0).to(torch.float64)",
        "seen = (total >= 0).to(torch.float64)",
        f"{EQUIVALENCE}::test_a_batch_empty_on_all_ranks_changes_nothing",
        "eager",
    ),
    Mutant(
        "a replayed pass exchanges again",
        f"{NORM}/replay.py",
        "return next((p.statistics for p in passes if torch.equal(p.own, own)), None)",
        "return None",
        f"{DIST}/test_wrapped.py::test_a_checkpointed_pass_neither_exchanges_nor_counts_again",
    ),
    Mutant(
        "a replayed pass counts again",
        f"{NORM}/steps.py",
        "if call.running is not None and not replaying():",
        "if call.running is not None:",
        f"{DIST}/test_wrapped.py::test_reentrant_checkpointing_counts_once",
    ),
    Mutant(
        "second derivatives of one rank alone",
        f"{NORM}/autograd.py",
        "return _SumOverRanks.apply(gradient, *ctx.rest), None, None",
        "return gradient, None, None",
        f"{DIST}/test_derivatives.py::test_a_gradient_penalty_is_that_of_one_big_batch",
    ),
    Mutant(
        "masked positions in the sums of backward",
        f"{NORM}/kernels/eager.py",
        "    return _masked(dz, fused.mask)\n",
        "    return dz\n",
        f"{UNIT}/test_fused.py::test_what_the_mask_leaves_out_has_no_part_in_anything",
    ),
]

EXCHANGE = [
    Mutant(
        "headers not compared through gloo",
        f"{NORM}/comm/transports/process_group.py",
        "if any(theirs != front for theirs in headers):",
        "if False:",
        f"{COMM}/test_gather.py::test_ranks_that_disagree_find_out_without_connections",
    ),
    Mutant(
        "headers not compared through connections",
        f"{NORM}/comm/transports/sockets.py",
        "        if gathered is None:\n",
        "        if False:\n",
        f"{COMM}/test_sockets.py::test_the_exchange_goes_on_after_ranks_met_in_different_layers",
    ),
    Mutant(
        "the frame of a rank elsewhere left in the connection",
        f"{NORM}/comm/transports/sockets.py",
        "bytearray(min(announced, CHUNK_BYTES))",
        "bytearray(0)",
        f"{COMM}/test_sockets.py::test_the_exchange_goes_on_after_ranks_met_in_different_layers",
    ),
    Mutant(
        "connections that not all ranks have",
        f"{NORM}/comm/transports/sockets.py",
        "if made is not None and not verdicts.all():",
        "if False:",
        f"{COMM}/test_sockets.py::test_ranks_that_cannot_all_connect_gather_through_the_group",
    ),
    Mutant(
        "strangers let in",
        f"{NORM}/comm/transports/sockets.py",
        "if hmac.compare_digest(told, secret):",
        "if True:",
        f"{COMM}/test_connect.py::test_only_who_knows_the_secret_is_let_in",
    ),
    Mutant(
        "headers not compared in shared memory",
        f"{NORM}/native/exchange.cpp",
        "!= 0) return kDiffer;",
        "!= 0) break;",
        f"{COMM}/test_disagreement.py::test_another_dtype",
    ),
    Mutant(
        "frames read before they are written",
        f"{NORM}/native/exchange.cpp",
        "__ATOMIC_ACQUIRE)) < ring->round;)",
        "__ATOMIC_ACQUIRE)) < ring->round - 1;)",
        f"{COMM}/test_shared_memory.py",
    ),
    Mutant(
        "one slot instead of two",
        f"{NORM}/native/exchange.cpp",
        "((ring->round % 2) * ring->world_size + rank)",
        "(0 * ring->world_size + rank)",
        f"{COMM}/test_shared_memory.py::test_thousands_of_exchanges_bring_every_ranks_latest_values",
    ),
    Mutant(
        "the second frame forgotten",
        f"{NORM}/comm/transports/shared_memory.py",
        "range(0, max(total, 1), PAYLOAD_BYTES)",
        "range(0, 1, PAYLOAD_BYTES)",
        f"{COMM}/test_shared_memory.py::test_payloads_of_any_size_arrive_whole",
    ),
    Mutant(
        "shared memory that not all ranks can map",
        f"{NORM}/comm/transports/shared_memory.py",
        "return memory if bool(verdicts.all()) else None",
        "return memory",
        f"{COMM}/test_shared_memory.py::test_ranks_that_cannot_share_memory_all_connect",
    ),
    Mutant(
        "layers without names told apart by nothing",
        f"{NORM}/comm/exchange.py",
        "code = self._serials.code(serial)",
        "code = NAMED",
        f"{COMM}/test_exchange_unnamed.py",
    ),
    Mutant(
        "the exit of a rank not noticed",
        f"{NORM}/comm/watchdog.py",
        'if self._state(rank) == "X":',
        "if False:",
        f"{COMM}/test_watchdog.py::test_a_rank_that_exited_is_lost_reaped_or_not",
    ),
    Mutant(
        "a rank named that may wait for a slow third",
        f"{NORM}/comm/watchdog.py",
        "return any(awaited) if own.symmetric else bool(awaited) and all(awaited)",
        "return True",
        f"{COMM}/test_watchdog.py::test_a_rank_is_held_up_only_by_ranks_that_are_held_up",
    ),
    Mutant(
        "a rank named for what it did before the wait",
        f"{NORM}/comm/watchdog.py",
        "post.quiet >= QUIET_TICKS and since > 0",
        "post.quiet >= QUIET_TICKS",
        f"{COMM}/test_watchdog.py::test_a_rank_that_may_have_moved_on_is_not_named",
    ),
    Mutant(
        "ranks blocked elsewhere never named",
        f"{NORM}/comm/watchdog.py",
        "            if rank in held:\n",
        "            if False:\n",
        f"{COMM}/test_watchdog.py::test_ranks_outside_the_group_are_asked_too",
    ),
    Mutant(
        "squared means left out of the reduction",
        f"{NORM}/sums.py",
        "M2s[0] + first * means[0]",
        "M2s[0]",
        f"{COMM}/test_exchange_scale.py::test_reduced_moments_are_those_of_all_values",
    ),
]

KERNELS = [
    Mutant(
        "the tail of a row not written",
        f"{NORM}/native/kernels_maps.h",
        "  if (i < end) store(out + end - lanes, op(k, end - lanes));\n",
        "",
        EVERY_CUT,
    ),
    Mutant(
        "blocks merged without their distance",
        f"{NORM}/native/kernels_reductions.h",
        "second[at] += b - a * offset + delta * delta * count * share;",
        "second[at] += b - a * offset;",
        EVERY_CUT,
    ),
    Mutant(
        "the last columns taken one off",
        f"{NORM}/native/kernels_reductions.h",
        "return j + lanes <= end ? j : end - lanes;",
        "return j + lanes <= end ? j : end - lanes - 1;",
        EVERY_CUT,
    ),
    Mutant(
        "deviations from 0",
        f"{NORM}/native/kernels_reductions.h",
        "shift[c] = moments ? sample_mean(op.x + first_of(block.row_begin, c), length)",
        "shift[c] = moments ? A(0)",
        f"{UNIT}/test_kernels.py::test_a_mean_large_against_the_spread_leaves_the_variance",
    ),
    Mutant(
        "relu's derivative forgotten",
        f"{NORM}/native/kernels_act.h",
        "case syncbn::RELU: return z > 0 ? dy : Piece{};",
        "case syncbn::RELU: return dy;",
        f"{UNIT}/test_cpu_kernels.py::test_every_fusion_is_as_exact_as_its_parts",
    ),
    Mutant(
        "a residual forgotten",
        f"{NORM}/native/kernels_passes.h",
        "if (role == syncbn::RESIDUAL) z = z + load(extra + i);",
        "",
        f"{UNIT}/test_cpu_kernels.py::test_every_fusion_is_as_exact_as_its_parts",
    ),
]

MUTANTS = [*LAYER, *EXCHANGE, *KERNELS]
