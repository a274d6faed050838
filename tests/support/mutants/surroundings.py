"""Mutants of what surrounds a pass: groups, conversion, populations, uneven batches, the training loop."""

from typing import Any

from mutants.planting import Mutant, Replaced

NORM, TESTS = "syncbn.norm", "tests/norm"
GROUPS = f"{TESTS}/comm/test_groups.py"
TRAINING = "tests/train/test_train_on_ranks.py::test_synchronised_ranks_train_as_one_process_on_the_whole_batch"


def gradients_summed(original: Any) -> Any:
    def backward(state: Any, whole: Any, x: Any, y: Any) -> Any:
        share = original(state, whole, x, y)
        for parameter in state.model.parameters():
            parameter.grad *= state.runtime.world_size
        return share

    return backward


def losses_unweighted(original: Any) -> Any:
    def backward(state: Any, whole: Any, x: Any, y: Any) -> Any:
        return original(state, len(x) * state.runtime.world_size, x, y)

    return backward


def nodes_by_local_rank(original: Any) -> Any:
    """Consecutive ranks, as many as a launcher says that it started on each node."""

    def nodes() -> list[list[int]]:
        import os

        import torch.distributed as dist

        size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        return [list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]

    return nodes


MUTANTS: list[Mutant] = [
    Replaced(
        "process_group ignored",
        f"{GROUPS}::test_statistics_are_shared_within_the_group_alone",
        aim=f"{NORM}.comm.exchange.exchange_for",
        by=lambda original: lambda spec, x: original(None, x),
    ),
    Replaced(
        "process_group ignored where a compiler traces",
        f"{TESTS}/test_wrapped.py::test_compiled_without_a_graph_break_it_gives_the_eager_numbers[2-ranks-1]",
        aim=f"{NORM}.ops.custom_op.group_text",
        by=lambda original: lambda spec: "world",
    ),
    Replaced(
        "node groups by number of ranks",
        f"{GROUPS}::test_node_means_the_ranks_of_one_host_however_they_were_started",
        aim=f"{NORM}.comm.groups._nodes",
        by=nodes_by_local_rank,
    ),
    Replaced(
        "gradients summed where DDP averages",
        f"{TRAINING}[2-ranks-whole batches]",
        aim="syncbn.train.loop._backward",
        by=gradients_summed,
    ),
    Replaced(
        "uneven losses unweighted",
        f"{TRAINING}[2-ranks-uneven last batches]",
        aim="syncbn.train.loop._backward",
        by=losses_unweighted,
    ),
    Replaced(
        "a strict conversion silent",
        f"{TESTS}/test_convert_left_alone.py::test_strict_refuses_it_and_changes_nothing",
        aim=f"{NORM}.convert.convert_sync_batchnorm",
        by=lambda original: (
            lambda module, process_group=None, *, strict=False, report=None: original(
                module, process_group, report=report
            )
        ),
    ),
    Replaced(
        "running statistics of a population with N in place of N - 1",
        f"{TESTS}/test_recalibrate.py::test_statistics_are_the_exact_moments_of_everything_that_entered_the_layer",
        aim=f"{NORM}.recalibrate._set",
        by=lambda original: (
            lambda layer, population: original(
                layer, population._replace(count=population.count + 1)
            )
        ),
    ),
    Replaced(
        "a population of one rank",
        f"{TESTS}/test_recalibrate.py::test_a_rank_without_data_still_gets_everybodys_statistics",
        aim=f"{NORM}.recalibrate._over_ranks",
        by=lambda original: lambda own, name, group: own,
    ),
    Replaced(
        "batches that end with the first rank's",
        f"{TESTS}/test_uneven.py::test_a_loop_in_lockstep_trains_as_one_process_does[2-ranks]",
        aim=f"{NORM}.uneven_inputs._Ranks.begin_step",
        by=lambda original: lambda self, state: original(self, state) and min(self.states) > 0,
    ),
]
