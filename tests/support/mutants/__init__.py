"""Errors that synchronised batch norms have had, or could have: the tests must see each of them."""

from mutants import checkpointing, comm, layer, native, surroundings, triton

MUTANTS = [
    *layer.MUTANTS,
    *surroundings.MUTANTS,
    *checkpointing.MUTANTS,
    *comm.MUTANTS,
    *native.MUTANTS,
    *triton.MUTANTS,
]
