"""Seats dealt to parties by weight, in closed form: which bucket and which source comes next follows from it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

FRACTION_BITS = 60  # of the fixed-point fractions: integers keep counts exact at any step


class Apportionment:
    """Deals any number of seats to parties by weight: every further seat goes to exactly one party.

    Parties are joined in pairs, lightest first, as in Huffman's tree; at each pair the seats are split by rounding to
    the nearest integer, which for two parties is Sainte-Lague's rule. Hence counts never fall as seats are added, and
    a party is off its due by less than 2 seats whatever the number of parties (its weight halves at least every second
    level upwards: 0.5 * (1 + 1 + 1/2 + 1/2 + 1/4 + ...)). Sainte-Lague's rule for all parties at once has no such
    bound: a hundred equal small parties get their first seats together, at the cost of a large one.

    owed: seats that each party is to get beyond its weight, or, below 0, to do without, the sum 0; they are made up for
    as fast as seats come in.
    """

    def __init__(self, weights: Sequence[float], *, owed: Sequence[float] | None = None) -> None:
        assert weights and all(weight > 0 for weight in weights), "parties without weight are left out before"
        self._num_parties = len(weights)
        # lighter child, heavier child, the lighter's fraction, what it gets beyond that and for rounding to the nearest
        self._splits: list[tuple[int, int, int, int]] = []
        beyond = list(owed) if owed is not None else [0.0] * len(weights)  # of parties and, behind them, of pairs
        heap = [(weight, party) for party, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (light, left), (heavy, right) = heapq.heappop(heap), heapq.heappop(heap)
            fraction = light / (light + heavy)
            beyond.append(beyond[left] + beyond[right])
            more = beyond[left] - fraction * beyond[-1]
            scaled, beyond_it = (round(number * 2**FRACTION_BITS) for number in (fraction, more))
            self._splits.append((left, right, scaled, beyond_it + (1 << (FRACTION_BITS - 1))))
            heapq.heappush(heap, (light + heavy, self._num_parties + len(self._splits) - 1))

    def counts(self, seats: int) -> list[int]:
        """Seats of each party out of `seats`."""
        counts = [0] * (self._num_parties + len(self._splits))
        counts[-1] = seats
        for place in range(len(self._splits) - 1, -1, -1):
            left, right, fraction, more = self._splits[place]
            count = counts[self._num_parties + place]
            counts[left] = min(max((count * fraction + more) >> FRACTION_BITS, 0), count)
            counts[right] = count - counts[left]
        return counts[: self._num_parties]
