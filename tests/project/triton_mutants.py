"""Errors planted in the Triton backend, as `mutants` has others."""

from mutants import BACKENDS, NORM, Mutant

TRITON_BACKEND = f"{NORM}/backends/triton"
LAUNCHED = f"{BACKENDS}/test_launched.py"
TRITON_CUT = f"{BACKENDS}/test_triton.py::test_every_value_counts_once_however_the_input_is_cut"

TRITON = [
    Mutant(
        "Triton: pieces merged without their distance",
        f"{TRITON_BACKEND}/statistics.py",
        "        M2 = tl.sum(M2s + counts * between * between, 0)",
        "        M2 = tl.sum(M2s, 0)",
        f"{BACKENDS}/test_triton.py::test_moments_of_ranks_merge",
    ),
    Mutant(
        "Triton: pieces merged without their distance, in turns",
        f"{TRITON_BACKEND}/statistics.py",
        "M2 += tl.sum(M2s + counts * between * between, 0)",
        "M2 += tl.sum(M2s, 0)",
        f"{BACKENDS}/test_triton.py::test_moments_of_ranks_merge",
    ),
    Mutant(
        "Triton: weight left out of dx",
        f"{TRITON_BACKEND}/elementwise.py",
        "(dz - mean_dz - centred * xhat_factor) * scale, 0.0)",
        "(dz - mean_dz - centred * xhat_factor) * invstd, 0.0)",
        TRITON_CUT,
    ),
    Mutant(
        "Triton: the mask ignored",
        f"{TRITON_BACKEND}/tiles.py",
        "if mask_ptr is not None:",
        "if False:",
        TRITON_CUT,
    ),
    Mutant(
        "Triton: the last step of a program left out",
        f"{TRITON_BACKEND}/tiles.py",
        "tl.minimum(first + steps_per_program, steps)",
        "tl.minimum(first + steps_per_program - 1, steps)",
        TRITON_CUT,
    ),
    Mutant(
        "Triton: Bessel's correction left out",
        f"{TRITON_BACKEND}/statistics.py",
        "return total / tl.maximum(total - 1, 1.0)",
        "return total / tl.maximum(total, 1.0)",
        f"{BACKENDS}/test_triton.py::test_running_statistics_move",
    ),
    Mutant(
        "Triton: moments counted from a poor shift",
        f"{TRITON_BACKEND}/reductions.py",
        "if tl.sum((poor & valid).to(tl.int32), 0) > 0:",
        "if tl.sum((poor & valid).to(tl.int32), 0) > K:",
        f"{BACKENDS}/test_triton.py::test_a_first_tile_unlike_the_rest_leaves_the_variance",
    ),
    Mutant(
        "Triton: running statistics moved by every program",
        f"{TRITON_BACKEND}/statistics.py",
        "if tl.program_id(1) == 0:",
        "if tl.program_id(1) >= 0:",
        f"{LAUNCHED}::test_what_follows_the_exchange_has_the_bits_of_the_phases",
    ),
    Mutant(
        "Triton: the first rank's sums taken for those of all",
        f"{TRITON_BACKEND}/elementwise.py",
        "for rank in range(1, W):",
        "for rank in range(1, 1):",
        f"{LAUNCHED}::test_ranks_give_the_numbers_of_one",
    ),
    Mutant(
        "Triton: the last bits of a row not stored",
        f"{TRITON_BACKEND}/tiles.py",
        "exists = valid[:, None] & (chunk * 64 < remaining)[None, :]",
        "exists = valid[:, None] & (chunk * 64 + 64 <= remaining)[None, :]",
        f"{BACKENDS}/test_triton.py::test_bits_take_the_place_of_the_output",
    ),
    Mutant(
        "Triton: code for aligned addresses run on others",
        f"{TRITON_BACKEND}/launch.py",
        "return addresses if combined % ALIGNMENT == 0 else None",
        "return addresses",
        f"{BACKENDS}/test_triton_launch.py",
    ),
    Mutant(
        "Triton: the residual's gradient in the strides of x",
        f"{TRITON_BACKEND}/backend.py",
        "dz = torch.empty_like(x, dtype=dy.dtype) if needs_dz",
        "dz = torch.empty_like(args.x, dtype=dy.dtype) if needs_dz",
        f"{LAUNCHED}::test_inputs_of_any_strides_get_their_gradients",
    ),
    Mutant(
        "Triton: bits of the wrong side",
        f"{TRITON_BACKEND}/activations.py",
        "unit_slope = unit_slope & (z < 6)",
        "unit_slope = unit_slope & (z < 7)",
        f"{BACKENDS}/test_triton.py::test_bits_take_the_place_of_the_output",
    ),
    Mutant(
        "Triton: one value per channel updates before it is refused",
        f"{TRITON_BACKEND}/backend.py",
        "if x.numel() <= x.shape[1]:",
        "if x.numel() == 0:",
        f"{BACKENDS}/test_triton.py::test_one_value_per_channel_is_refused_before_anything_is_updated",
    ),
]
