"""Mutants of what a training pass computes: statistics, their exchange, running statistics, gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

from mutants.planting import Edited, Mutant, Replaced

NORM, TESTS = "syncbn.norm", "tests/norm"
EQUIVALENCE = f"{TESTS}/test_equivalence.py"
ONE_BATCH = f"{EQUIVALENCE}::test_any_split_matches_one_big_batch_in_float64[2-ranks-4d]"
LARGE_MEAN = f"{EQUIVALENCE}::test_float32_stays_within_its_bound_even_at_a_large_mean[2-ranks-100.0-0.01-0.001]"
LAUNCHED = f"{TESTS}/backends/test_launched.py::test_ranks_give_the_numbers_of_one"
DERIVATIVES = f"{TESTS}/test_derivatives.py"
ATEN = f"{NORM}.backends.aten"


class Path(NamedTuple):
    """A way through the layer, the test that takes it, and the variables that make it do so."""

    name: str
    test: str = ONE_BATCH
    kernels: str = ""
    exchange: str = ""


ALL_PATHS = [
    Path("ATen", kernels="eager"),
    Path("native code in phases through gloo", exchange="gloo"),
    Path("native code in phases through sockets", exchange="sockets"),
    Path("native code in one call", exchange="shared"),
    Path("Triton", f"{LAUNCHED}[2-ranks-None-shape0-False-0.3-planes]"),
]


def _on(paths: list[Path], what: str, aim: str, by: Callable[[Any], Any]) -> list[Mutant]:
    return [
        Replaced(f"{what}: {name}", test, kernels, exchange, aim=aim, by=by)
        for name, test, kernels, exchange in paths
    ]


def _of_aten(what: str, aim: str, by: Callable[[Any], Any], test: str = ONE_BATCH) -> Mutant:
    return Replaced(what, test, "eager", aim=aim, by=by)


def variances_averaged(original: Any) -> Any:
    def merge(counts: Any, means: Any, M2s: Any) -> Any:
        merged = original(counts, means, M2s)
        variances = M2s / counts.unsqueeze(1).clamp(min=1)
        return merged._replace(M2=variances.mean(0) * merged.count)

    return merge


def means_averaged(original: Any) -> Any:
    def merge(counts: Any, means: Any, M2s: Any) -> Any:
        return original(counts, means, M2s)._replace(mean=means.mean(0))

    return merge


def squares_of_values(original: Any) -> Any:
    def local_stats(self: Any, args: Any) -> Any:
        packed = original(self, args)
        dims = [dim for dim in range(args.x.dim()) if dim != 1]
        mean, M2 = packed[2:].chunk(2)
        count = args.x.numel() / args.x.shape[1]
        M2.copy_(args.x.square().sum(dims) - count * mean.square())
        return packed

    return local_stats


def with_running(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`aten.update` of changed running statistics."""
    return lambda original: lambda running, stats: original(change(running), stats)


def with_total(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`aten.update` by statistics of another number of values."""
    return lambda original: (
        lambda running, stats: original(running, stats._replace(total=change(stats.total)))
    )


def parameters_reduced_too(original: Any) -> Any:
    def backward_pass(dy: Any, args: Any, stats: Any, backend: Any, call: Any, needs: Any) -> Any:
        import torch

        from syncbn.norm.comm.fingerprint import BACKWARD

        dx, dweight, dbias, dz = original(dy, args, stats, backend, call, needs)
        sums = torch.stack([dbias, dweight])
        what = call.fingerprint(args.x, True)
        rows = call.exchange.combine(sums.flatten(), BACKWARD, what)
        dbias, dweight = rows.sum(0).view_as(sums)
        return dx, dweight, dbias, dz

    return backward_pass


def backward_unreduced(original: Any) -> Any:
    def gather_rows(values: Any, exchange: Any, direction: int, what: Any) -> Any:
        from syncbn.norm.comm.fingerprint import BACKWARD

        return original(values, None if direction == BACKWARD else exchange, direction, what)

    return gather_rows


def batches_left_out(original: Any) -> Any:
    def sum_over_ranks(values: Any, exchange: Any, what: Any) -> Any:
        from syncbn.norm.ops.autograd import is_transformed

        return values if is_transformed(values) else original(values, exchange, what)

    return sum_over_ranks


def exchanged_whatever_it_holds(original: Any) -> Any:
    def exchange_for(spec: Any, x: Any) -> Any:
        import torch

        exchange = original(spec, torch.empty(0))
        if exchange is not None and x.is_meta:
            _exchange_zeros(exchange, "mutant", x)
        return original(spec, x)

    return exchange_for


def evaluation_exchanges(original: Any) -> Any:
    def evaluate(self: Any, input: Any, mask: Any, residual: Any) -> Any:
        from syncbn.norm.comm.exchange import exchange_for

        exchange = exchange_for(self.process_group, input)
        if exchange is not None:
            _exchange_zeros(exchange, self._title(), input)
        return original(self, input, mask, residual)

    return evaluate


def _exchange_zeros(exchange: Any, layer: str, x: Any) -> None:
    import torch

    from syncbn.norm.comm.fingerprint import FORWARD, Fingerprint

    what = Fingerprint(layer, x.shape[1], x.dtype, False)
    exchange.combine(torch.zeros(2 + 2 * x.shape[1]), FORWARD, what)


MUTANTS: list[Mutant] = [
    *_on(
        ALL_PATHS[:3] + ALL_PATHS[4:],
        "no reduction in backward",
        f"{NORM}.ops.collectives.gather_rows",
        backward_unreduced,
    ),
    *_on(
        ALL_PATHS,
        "weight and bias gradients reduced too",
        f"{NORM}.ops.autograd.backward_pass",
        parameters_reduced_too,
    ),
    _of_aten("per-rank variances averaged", f"{NORM}.moments.merge", variances_averaged),
    _of_aten("mean of means with unequal counts", f"{NORM}.moments.merge", means_averaged),
    _of_aten(
        "E[x^2] - E[x]^2 in float32",
        f"{ATEN}.AtenBackend.local_stats",
        squares_of_values,
        LARGE_MEAN,
    ),
    _of_aten(
        "Bessel's correction with one rank's count",
        f"{ATEN}.update",
        with_total(lambda total: total / 2),
    ),
    _of_aten(
        "momentum applied once a rank",
        f"{ATEN}.update",
        with_running(lambda running: running._replace(momentum=1 - (1 - running.momentum) ** 2)),
    ),
    _of_aten(
        "num_batches_tracked not counted",
        f"{ATEN}.update",
        with_running(lambda running: running._replace(num_batches_tracked=None)),
    ),
    _of_aten(
        "an empty batch counted",
        f"{ATEN}.update",
        with_total(lambda total: total.clamp(min=1)),
        f"{EQUIVALENCE}::test_a_batch_empty_on_all_ranks_changes_nothing",
    ),
    _of_aten(
        "masked positions in the sums of backward",
        f"{ATEN}._grad_before_act",
        lambda original: lambda dy, args, stats: original(dy, args._replace(mask=None), stats),
        f"{TESTS}/test_fused.py::test_what_the_mask_leaves_out_has_no_part_in_anything",
    ),
    Replaced(
        "evaluation still exchanges",
        f"{EQUIVALENCE}::test_evaluation_communicates_nothing",
        aim=f"{NORM}.module.SyncBatchNorm._evaluate",
        by=evaluation_exchanges,
    ),
    Edited(
        "second derivatives of one rank alone",
        f"{DERIVATIVES}::test_a_gradient_penalty_is_that_of_one_big_batch",
        file="syncbn/norm/ops/collectives.py",
        function="_gradient",
        before="_sum_over_ranks(gradient.contiguous(), *ctx.rest)",
        after="gradient.clone()",
    ),
    Replaced(
        "a batch of gradients summed over no ranks",
        f"{TESTS}/ops/test_transformed.py::test_a_vectorised_jacobian_is_that_of_one_process",
        aim=f"{NORM}.ops.collectives.sum_over_ranks",
        by=batches_left_out,
    ),
    Replaced(
        "tensors without values exchanged",
        f"{TESTS}/ops/test_without_values.py::"
        "test_tensors_without_values_give_shapes_on_one_rank_while_the_other_does_nothing[2-ranks-None-meta-plain]",
        aim=f"{NORM}.comm.exchange.exchange_for",
        by=exchanged_whatever_it_holds,
    ),
    Replaced(
        "strides that the compiler is told wrong",
        f"{TESTS}/ops/test_custom_op.py::test_fake_and_real_results_agree_for_every_layout[-False-channels_last]",
        aim=f"{NORM}.ops.custom_op._empty_like",
        by=lambda original: lambda x: x.new_empty(x.shape),
    ),
    Replaced(
        "operands that do not fit unchecked",
        f"{TESTS}/test_module.py::test_a_parameter_of_another_size_than_the_channels_is_refused",
        aim=f"{NORM}.ops.autograd._check_fit",
        by=lambda original: lambda args, exchange, running, *like_x: None,
    ),
    Replaced(
        "lazily negated views read at their address",
        f"{TESTS}/test_operand_memory.py::test_a_lazily_negated_view_counts_with_its_own_values",
        aim=f"{NORM}.backends.base.kernels_may_read",
        by=lambda original: lambda x, *others: True,
    ),
]
