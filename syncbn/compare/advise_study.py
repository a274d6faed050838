"""The two short studies behind `syncbn advise`, as overrides of conf/study/advise.yaml.

The decision that shaped the file: what an arm is worth is measured on virtual ranks, which any machine can afford at
any world size, and what it costs on real ones, which a machine has no more of than cores; so these are two studies, and
the second is left out where it would measure the scheduler.
"""

from collections.abc import Sequence

from syncbn.compare.repeat import hydra_value

COST_STEPS = 120
COST_SEEDS = [0, 1, 2, 3, 4, 5]


def group_sizes(world_size: int) -> list[int]:
    """Sizes of groups between one rank and all: the proper divisors of `world_size`."""
    return [size for size in range(2, world_size) if world_size % size == 0]


def group_arm(size: int) -> str:
    """The name of the arm that synchronises over groups of `size` ranks."""
    return f"group_{size}"


def error_study(settings: Sequence[str], world_size: int) -> list[str]:
    """Overrides of the study of errors: `settings`, and an arm for each size of group between one rank and all."""
    return ["study=advise", *settings, *_groups(group_sizes(world_size))]


def cost_study(settings: Sequence[str], name: str, sizes: Sequence[int]) -> list[str]:
    """Overrides of the study of cost: the same on real ranks, briefly, with clocks on the exchange.

    Args:
        settings: the user's own.
        name: of the study of errors; this one is called `<name>-cost`.
        sizes: groups that are timed beside `local` and `sync`.
    """
    return [
        "study=advise",
        *settings,
        *_groups(sizes),
        f"name={cost_name(name)}",
        "train.virtual=false",
        f"train.steps={COST_STEPS}",
        "train.eval_every=0",
        "probe.names=[exchange]",
        f"study.seeds={hydra_value(COST_SEEDS)}",
        "study.primary_metric=step_ms",
        "study.question='What does synchronising cost this network on this machine?'",
    ]


def cost_name(name: str) -> str:
    """What the study of cost is called that belongs to the study of errors `name`."""
    return f"{name}-cost"


def _groups(sizes: Sequence[int]) -> list[str]:
    return [
        f"+study.arms.{group_arm(k)}={hydra_value(['norm=sync_group', f'norm.group_size={k}'])}"
        for k in sizes
    ]
