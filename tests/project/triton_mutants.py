"""Errors of what runs on GPUs, as `mutants` has others."""

from mutants import DIST, NORM, UNIT, Mutant

LAUNCHED = f"{DIST}/test_launched.py"
TRITON_CUT = f"{UNIT}/test_triton.py::test_every_value_counts_once_however_the_input_is_cut"

TRITON = [
    Mutant(
        "Triton: pieces merged without their distance",
        f"{NORM}/kernels/triton_rows.py",
        "        M2 = tl.sum(M2s + counts * between * between, 0)",
        "        M2 = tl.sum(M2s, 0)",
        f"{UNIT}/test_triton.py::test_moments_of_ranks_merge",
    ),
    Mutant(
        "Triton: pieces merged without their distance, in turns",
        f"{NORM}/kernels/triton_rows.py",
        "M2 += tl.sum(M2s + counts * between * between, 0)",
        "M2 += tl.sum(M2s, 0)",
        f"{UNIT}/test_triton.py::test_moments_of_ranks_merge",
    ),
    Mutant(
        "Triton: weight left out of dx",
        f"{NORM}/kernels/triton_maps.py",
        "(dz - mean_dz - centred * tilt) * scale, 0.0)",
        "(dz - mean_dz - centred * tilt) * invstd, 0.0)",
        TRITON_CUT,
    ),
    Mutant(
        "Triton: the mask ignored",
        f"{NORM}/kernels/triton_tiles.py",
        "if mask_ptr is not None:",
        "if False:",
        TRITON_CUT,
    ),
    Mutant(
        "Triton: the last step of a program left out",
        f"{NORM}/kernels/triton_tiles.py",
        "tl.minimum(first + steps_per_program, steps)",
        "tl.minimum(first + steps_per_program - 1, steps)",
        TRITON_CUT,
    ),
    Mutant(
        "Triton: Bessel's correction left out",
        f"{NORM}/kernels/triton_statistics.py",
        "return total / tl.maximum(total - 1, 1.0)",
        "return total / tl.maximum(total, 1.0)",
        f"{UNIT}/test_triton.py::test_running_statistics_move",
    ),
    Mutant(
        "Triton: moments counted from a poor shift",
        f"{NORM}/kernels/triton_reductions.py",
        "if tl.sum((poor & known).to(tl.int32), 0) > 0:",
        "if tl.sum((poor & known).to(tl.int32), 0) > K:",
        f"{UNIT}/test_triton.py::test_a_first_tile_unlike_the_rest_leaves_the_variance",
    ),
    Mutant(
        "Triton: running statistics moved by every program",
        f"{NORM}/kernels/triton_statistics.py",
        "if tl.program_id(1) == 0:",
        "if tl.program_id(1) >= 0:",
        f"{LAUNCHED}::test_what_follows_the_exchange_has_the_bits_of_the_steps",
    ),
    Mutant(
        "Triton: the first rank's sums taken for those of all",
        f"{NORM}/kernels/triton_maps.py",
        "for rank in range(1, W):",
        "for rank in range(1, 1):",
        f"{LAUNCHED}::test_ranks_give_the_numbers_of_one",
    ),
    Mutant(
        "Triton: the last bits of a row not stored",
        f"{NORM}/kernels/triton_bits.py",
        "exists = known[:, None] & (chunk * 64 < room)[None, :]",
        "exists = known[:, None] & (chunk * 64 + 64 <= room)[None, :]",
        f"{UNIT}/test_triton.py::test_bits_take_the_place_of_the_output",
    ),
    Mutant(
        "Triton: code for aligned addresses run on others",
        f"{NORM}/kernels/triton_launch.py",
        "usual = usual and together % ALIGNMENT == 0 and max(numbers) < 2**31",
        "usual = usual and max(numbers) < 2**31",
        f"{UNIT}/test_triton_launch.py",
    ),
    Mutant(
        "Triton: the residual's gradient in the strides of x",
        f"{NORM}/launched.py",
        "x = kernel.dense(x)",
        "kernel.dense(x)",
        f"{LAUNCHED}::test_inputs_of_any_strides_get_their_gradients",
    ),
    Mutant(
        "Triton: bits of the wrong side",
        f"{NORM}/kernels/triton_acts.py",
        "above = above & (z < 6)",
        "above = above & (z < 7)",
        f"{UNIT}/test_triton.py::test_bits_take_the_place_of_the_output",
    ),
]
