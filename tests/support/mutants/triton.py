"""Mutants of the Triton backend, whose kernels an interpreter runs on the CPU."""

from mutants.layer import LAUNCHED
from mutants.planting import Edited, Mutant, Replaced

FILES, BACKENDS = "syncbn/norm/backends/triton", "tests/norm/backends"
TRITON, LAUNCHES = f"{BACKENDS}/test_triton.py", f"{BACKENDS}/test_launched.py"
EVERY_CUT = f"{TRITON}::test_every_value_counts_once_however_the_input_is_cut"
RANKS_MERGE = f"{TRITON}::test_moments_of_ranks_merge"
MOVE = f"{TRITON}::test_running_statistics_move"
ON_RANKS = f"{LAUNCHED}[2-ranks-None-shape0-False-0.3-planes]"
BITS = f"{TRITON}::test_bits_take_the_place_of_the_output"


def _in(module: str, function: str, before: str, after: str, what: str, test: str) -> Mutant:
    file = f"{FILES}/{module}.py"
    return Edited(f"Triton: {what}", test, file=file, function=function, before=before, after=after)


MUTANTS: list[Mutant] = [
    _in(
        "elementwise",
        "finish_backward_kernel",
        "range(1, W)",
        "range(1, 1)",
        "the first rank's sums taken for those of all",
        ON_RANKS,
    ),
    _in(
        "statistics",
        "merged",
        "        M2 = tl.sum(M2s + counts * between * between, 0)",
        "        M2 = tl.sum(M2s, 0)",
        "rows merged without their distance",
        RANKS_MERGE,
    ),
    _in(
        "statistics",
        "merged",
        "M2 += tl.sum(M2s + counts * between * between, 0)",
        "M2 += tl.sum(M2s, 0)",
        "rows merged without their distance, in turns",
        RANKS_MERGE,
    ),
    _in(
        "statistics",
        "merged",
        "tl.sum(counts * means, 0) / tl.maximum(total, 1.0)",
        "tl.sum(means, 0) / W",
        "mean of means with unequal counts",
        ON_RANKS,
    ),
    _in(
        "statistics",
        "_bessel",
        "total / tl.maximum(total - 1, 1.0)",
        "total / tl.maximum(total - 2, 1.0)",
        "Bessel's correction with one rank's count",
        ON_RANKS,
    ),
    _in(
        "statistics",
        "_bessel",
        "total / tl.maximum(total - 1, 1.0)",
        "total / tl.maximum(total, 1.0)",
        "Bessel's correction left out",
        MOVE,
    ),
    _in(
        "statistics",
        "_move",
        "(1 - factor) + new * factor",
        "(1 - factor) * (1 - factor) + new * (2 - factor) * factor",
        "momentum applied once a rank",
        ON_RANKS,
    ),
    _in(
        "statistics",
        "finish_forward_kernel",
        "+ seen.to(tl.int64)",
        "+ 0 * seen.to(tl.int64)",
        "num_batches_tracked not counted",
        ON_RANKS,
    ),
    _in(
        "statistics",
        "update_kernel",
        "seen = (total > 0).to(tl.float64)",
        "seen = (total >= 0).to(tl.float64)",
        "an empty batch counted",
        MOVE,
    ),
    _in(
        "statistics",
        "finish_forward_kernel",
        "if tl.program_id(1) == 0:",
        "if tl.program_id(1) >= 0:",
        "running statistics moved by every program",
        f"{LAUNCHES}::test_what_follows_the_exchange_has_the_bits_of_a_rank_without_samples",
    ),
    _in(
        "reductions",
        "moments_kernel",
        "if tl.sum((poor & program.valid).to(tl.int32), 0) > 0:",
        "if tl.sum((poor & program.valid).to(tl.int32), 0) > K:",
        "moments counted from a poor shift",
        f"{TRITON}::test_a_first_tile_unlike_the_rest_leaves_the_variance",
    ),
    _in(
        "elementwise",
        "finish_backward_kernel",
        "* xhat_factor) * given.scale",
        "* xhat_factor) * given.invstd",
        "weight left out of dx",
        EVERY_CUT,
    ),
    _in("tiles", "tile_of", "mask_ptr is not None", "False", "the mask ignored", EVERY_CUT),
    _in(
        "tiles",
        "this_program",
        "tl.minimum(first + steps_per_program, steps)",
        "tl.minimum(first + steps_per_program - 1, steps)",
        "the last step of a program left out",
        EVERY_CUT,
    ),
    _in(
        "tiles",
        "store_bits",
        "(chunk * 64 < tile.remaining)",
        "(chunk * 64 + 64 <= tile.remaining)",
        "the last bits of a row not stored",
        BITS,
    ),
    _in("activations", "has_unit_slope", "(z < 6)", "(z < 7)", "bits of the wrong side", BITS),
    _in(
        "launch",
        "_addresses",
        "if combined % ALIGNMENT == 0 else None",
        "",
        "code for aligned addresses run on others",
        f"{BACKENDS}/test_triton_launch.py",
    ),
    _in(
        "backend",
        "TritonBackend.local_grad_sums",
        "torch.empty_like(x, dtype=dy.dtype) if needs_dz and",
        "torch.empty_like(args.x, dtype=dy.dtype) if needs_dz and",
        "the residual's gradient in the strides of x",
        f"{LAUNCHES}::test_inputs_of_any_strides_get_their_gradients",
    ),
    _in(
        "backend",
        "TritonBackend.finish_forward",
        "args.x.numel() > args.x.shape[1]",
        "args.x.numel() > 0",
        "one value per channel updates before it is refused",
        f"{TRITON}::test_one_value_per_channel_is_refused_before_anything_is_updated",
    ),
    Replaced(
        "Triton: strided running statistics moved as contiguous ones",
        f"{TRITON}::test_running_statistics_may_be_strided",
        aim="syncbn.norm.backends.base.kernels_may_write",
        by=lambda original: lambda running: True,
    ),
]
