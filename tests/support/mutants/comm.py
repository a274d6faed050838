"""Mutants of what crosses between ranks: frames, headers, transports, and the watchdog."""

from typing import Any

from mutants.planting import Edited, Mutant, Replaced

COMM, FILES, TESTS = "syncbn.norm.comm", "syncbn/norm/comm", "tests/norm/comm"
SHARED, SOCKETS = f"{TESTS}/test_shared_memory.py", f"{TESTS}/test_sockets.py"
WATCHDOG, WATCHED = f"{TESTS}/test_watchdog.py", f"{TESTS}/test_watchdog_ranks.py"
OTHER_LAYERS = f"{SOCKETS}::test_the_exchange_goes_on_after_ranks_met_in_different_layers"
THOUSANDS = f"{SHARED}::test_thousands_of_exchanges_bring_every_ranks_latest_values"


def reports_who_answers(original: Any) -> Any:
    """Names any rank that has not come, whatever it does."""

    def judged(self: Any) -> Any:
        posts = self._posts.items()
        return original(self) or next((self._never(rank, post.text) for rank, post in posts), None)

    return judged


TRANSPORTS: list[Mutant] = [
    Edited(
        "headers not compared: gloo",
        f"{TESTS}/test_gather.py::test_ranks_that_disagree_find_out_without_connections",
        file=f"{FILES}/transports/process_group.py",
        function="Group.exchange",
        before="any(theirs != front for theirs in headers)",
        after="False",
    ),
    Edited(
        "headers not compared: sockets",
        OTHER_LAYERS,
        file=f"{FILES}/transports/sockets.py",
        function="Sockets._frames",
        before="any(theirs != front for theirs in headers)",
        after="False",
    ),
    Edited(
        "headers not compared: shared memory",
        f"{TESTS}/test_disagreement.py::test_another_dtype",
        file="syncbn/norm/native/exchange.cpp",
        function="wait_for_all",
        before="return HEADERS_DIFFER;",
        after="break;",
    ),
    Edited(
        "the frame of a rank in another layer left in the connection",
        OTHER_LAYERS,
        file=f"{FILES}/transports/sockets.py",
        function="Sockets._frames",
        before="min(announced, CHUNK_BYTES)",
        after="0",
    ),
    Edited(
        "connections that not all ranks have",
        f"{SOCKETS}::test_ranks_that_cannot_all_connect_gather_through_the_group",
        file=f"{FILES}/transports/sockets.py",
        function="Sockets.over",
        before="agreed and ",
        after="",
    ),
    Edited(
        "strangers let in",
        f"{TESTS}/test_connect.py::test_only_who_knows_the_secret_is_let_in",
        file=f"{FILES}/transports/sockets.py",
        function="_admit",
        before="hmac.compare_digest(told, secret)",
        after="True",
    ),
    Edited(
        "frames read before they are written",
        SHARED,
        file="syncbn/norm/native/exchange.cpp",
        function="wait_for_all",
        before="< memory->round;)",
        after="< memory->round - 1;)",
    ),
    Edited(
        "one slot instead of two",
        THOUSANDS,
        file="syncbn/norm/native/exchange.cpp",
        function="slot",
        before="(memory->round % 2)",
        after="0",
    ),
    Edited(
        "the second frame forgotten: shared memory",
        f"{SHARED}::test_payloads_of_any_size_arrive_whole",
        file=f"{FILES}/transports/shared_memory.py",
        function="SharedMemory.exchange",
        before="max(total, 1)",
        after="1",
    ),
    Edited(
        "the second frame forgotten: gloo",
        f"{TESTS}/test_gather.py::test_payloads_of_any_size_arrive_in_rank_order",
        file=f"{FILES}/transports/process_group.py",
        function="Group.exchange",
        before="len(own) > room",
        after="False",
    ),
    Edited(
        "memory that not all ranks can map",
        f"{SHARED}::test_ranks_that_cannot_share_memory_all_connect",
        file=f"{FILES}/transports/shared_memory.py",
        function="SharedMemory.over",
        before="agreed and ",
        after="",
    ),
    Replaced(
        "layers without names told apart by nothing",
        f"{TESTS}/test_exchange_unnamed.py",
        aim=f"{COMM}.fingerprint.Serials.code",
        by=lambda original: lambda self, serial: -1,
    ),
    Edited(
        "squared means left out of the reduction",
        f"{TESTS}/test_exchange_scale.py::test_reduced_moments_are_those_of_all_values",
        file="syncbn/norm/moments.py",
        function="to_sums",
        before="M2s[0] + first * means[0]",
        after="M2s[0]",
    ),
    Replaced(
        "float64 reduced where it must be gathered",
        f"{TESTS}/test_exchange_scale.py::test_float64_is_always_gathered",
        aim=f"{COMM}.exchange.Exchange._is_reduced",
        by=lambda original: lambda self, values: original(self, values.float()),
    ),
    Edited(
        "ranks reduce without comparing headers",
        f"{TESTS}/test_exchange_scale.py::test_ranks_that_disagree_find_out_before_they_reduce",
        file=f"{FILES}/exchange.py",
        function="Exchange.combine",
        before="if not values.is_cuda:",
        after="if False:",
    ),
    Replaced(
        "a rank that cannot take part says nothing",
        f"{TESTS}/test_disagreement.py::test_bad_input_on_one_rank_is_reported_on_all",
        aim=f"{COMM}.exchange.Exchange.fail",
        by=lambda original: lambda self, message: None,
    ),
]

LIVENESS: list[Mutant] = [
    Replaced(
        "a watchdog that never reports",
        f"{WATCHDOG}::test_a_rank_blocked_in_another_collective_is_named_once_it_was_seen_there_during_the_wait",
        aim=f"{COMM}.watchdog.Wait._judged",
        by=lambda original: lambda self: None,
    ),
    Replaced(
        "a watchdog that reports a rank that computes",
        f"{WATCHED}::test_a_rank_in_eval_mode_is_waited_for_its_backward_passes_included[gloo-2-ranks-later]",
        aim=f"{COMM}.watchdog.Wait._judged",
        by=reports_who_answers,
    ),
    Replaced(
        "a rank reported that was blocked for a moment",
        f"{WATCHDOG}::test_a_rank_that_may_have_moved_on_is_not_named",
        aim=f"{COMM}.watchdog.Wait._is_blocked",
        by=lambda original: lambda self, rank: self._posts[rank].collective is not None,
    ),
    Replaced(
        "a rank reported that waits for a slow one",
        f"{WATCHDOG}::test_a_rank_is_held_up_only_by_ranks_that_are_held_up",
        aim=f"{COMM}.watchdog.held_up",
        by=lambda original: lambda blocked: set(blocked),
    ),
    Replaced(
        "the exit of a rank not noticed",
        f"{WATCHDOG}::test_a_rank_that_exited_is_lost_reaped_or_not",
        aim=f"{COMM}.processes.Process.state",
        by=lambda original: lambda self: original(self).replace("X", ""),
    ),
    Replaced(
        "why a rank gave up not told",
        f"{WATCHDOG}::test_a_rank_that_gives_up_tells_the_others",
        aim=f"{COMM}.watchdog._Watchdog.tell",
        by=lambda original: lambda self, group, lost, message: None,
    ),
    Replaced(
        "a watchdog that waits for the store of a group that is gone stays",
        f"{TESTS}/test_watchdog_thread.py::test_a_watchdog_that_waits_for_the_store_of_a_group_that_is_gone_is_replaced",
        aim=f"{COMM}.watchdog._Watchdog.is_stuck",
        by=lambda original: lambda self: False,
    ),
    Replaced(
        "why a rank gave up its first exchange not heard",
        f"{TESTS}/test_rendezvous.py::test_a_rank_that_comes_after_another_gave_up_hears_why",
        aim=f"{COMM}.rendezvous._hear_of_failure",
        by=lambda original: lambda group: None,
    ),
]

MUTANTS: list[Mutant] = [*TRANSPORTS, *LIVENESS]
