"""Whether a role's replicas hold the same weights, bit for bit: a bit that flips on one is learned on, unseen.

Asked right before an update, where every replica's weights are whole even if their gathering overlaps.
"""

from __future__ import annotations

from collections import Counter

import torch

from megatron_xy import device
from megatron_xy.errors import PeerLost
from megatron_xy.parallel import gathered_over
from megatron_xy.role import Role

_AS_INTEGERS = {4: torch.int32, 2: torch.int16}  # by bytes of an element


def check_replicas(role: Role, *, seen: str) -> None:
    """Raises PeerLost, on all ranks alike, naming those whose weights differ. Collective over the role's ranks.

    seen: when, in a few words.
    """
    groups = role.groups
    if groups.dp_size == 1:
        return
    odd = [groups.ranks[place] for place in odd_ranks(_weight_sums(role), shape=(groups.pp_size, groups.dp_size))]
    if odd:
        whose = f"rank {odd[0]} holds" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} hold"
        raise PeerLost(
            f"{whose} other weights than the replicas of the same part of the model, seen {seen}: "
            f"a bit flipped in memory, on a link or in a computation: start the run again from its last "
            f"checkpoint, and have the memory and devices there checked; or machines that are not alike: set "
            f"parallel.use_distributed_optimizer, which updates each weight in one place"
        )


def check_unplanned_save(role: Role, *, iteration: int) -> None:
    """Likewise after a step whose update came without that, as nobody knew that it would be saved.

    Under the distributed optimizer each weight has one owner, and what the update gave is all that there is to see.
    """
    if not role.parallel.use_distributed_optimizer:
        check_replicas(role, seen=f"after step {iteration}")


def odd_ranks(sums: list[int], *, shape: tuple[int, int]) -> list[int]:
    """Places whose sum is not the one that most replicas of their part of the model have; where half have it, all.

    sums: by place in the role; shape: (pp, dp) of the places, the tensor parallel ones innermost.
    """
    num_stages, num_replicas = shape
    width = len(sums) // (num_stages * num_replicas)
    odd: list[int] = []
    for stage in range(num_stages):
        for column in range(width):
            places = [(stage * num_replicas + replica) * width + column for replica in range(num_replicas)]
            usual, count = Counter(sums[place] for place in places).most_common(1)[0]
            if 2 * count > num_replicas:
                odd += [place for place in places if sums[place] != usual]
            elif count < num_replicas:
                odd += places
    return sorted(odd)


@torch.no_grad()
def _weight_sums(role: Role) -> list[int]:
    """Of every rank, its weights' bits, read as integers and added up: any one bit makes a difference.

    Each tensor's sum wraps around in the integers' own width, which is ten times as fast on a CPU as adding in 64 bits.
    """
    total = torch.zeros(1, dtype=torch.int64, device=device.current())
    for named in role.named_parameters():
        bits = named.parameter.detach().view(_AS_INTEGERS[named.parameter.element_size()])
        total += bits.sum(dtype=bits.dtype)
    return [int(value) for value in gathered_over(total, role.groups.all_ranks).flatten().tolist()]
