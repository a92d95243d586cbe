"""Which units' saved tensors a link can carry to the host and back while others run, so that none waits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gradkern.checkpoint._offload import Offload
from gradkern.checkpoint._profile import Span
from gradkern.checkpoint._solver import Option

__all__ = ["Traffic", "traffic"]

# How many units to offload is tried at so many numbers, up to all that the link can carry.
_TRIES = 6


@dataclass(frozen=True)
class Traffic:
    """Units to offload.

    Attributes:
        offloads: They.
        on_the_way: Most bytes that are still or again there while another unit runs, for stem, units and head.
    """

    offloads: tuple[Offload, ...]
    on_the_way: tuple[int, ...]

    def costs(self, names: Sequence[str], costs: Sequence[Sequence[Option]]) -> list[list[Option]]:
        """Costs of stem, units and head with these offloaded: of those, as first option, the only one.

        Args:
            names: The units.
            costs: Of stem, units and head; first kept, then recomputed.
        """
        offloaded = {each.unit for each in self.offloads}
        found = []
        for name, options, more in zip((None, *names, None), costs, self.on_the_way, strict=True):
            if name in offloaded:
                keep, again = options[:2]
                options = [Option(again.saved_bytes, keep.peak_bytes, 0.0)]
            found.append([Option(each.saved_bytes, each.peak_bytes + more, each.extra_s) for each in options])
        return found


def traffic(
    names: Sequence[str], can_travel: Collection[str], spans: Sequence[Span], bytes_per_s: float
) -> list[Traffic]:
    """Ways to offload, the one with most units first; none where the link is too slow for one unit.

    A unit is sent as soon as its forward is over, if nothing else is being sent then, and fetched as late as it can be
    so as to be there in time. Backward is taken to last as long as without recomputation: with it there is more time.

    Args:
        names: The units in order of execution.
        can_travel: Those that may be offloaded.
        spans: Stem, units and head with everything kept.
        bytes_per_s: Of the link, each way.
    """
    forward_s = list(itertools.accumulate((span.forward_s for span in spans), initial=0.0))
    backward_s = list(itertools.accumulate((span.backward_s for span in reversed(spans)), initial=0.0))
    backward_s = [backward_s[len(spans) - 1 - at] for at in range(len(spans))]  # when it begins
    found: list[tuple[int, int, int]] = []
    link_free_s, back_s = 0.0, math.inf
    for at, name in enumerate(names, start=1):
        over_s, seconds = forward_s[at + 1], spans[at].saved_bytes / bytes_per_s
        if name not in can_travel or link_free_s > over_s or seconds <= 0.0:
            continue
        released = [to for to in range(at + 1, len(names) + 1) if forward_s[to] >= over_s + seconds]
        begins_s = min(backward_s[at], back_s) - seconds
        fetched = [to for to in range(at + 1, len(names) + 1) if backward_s[to] <= begins_s]
        if not released or not fetched:
            continue
        found.append((at, released[0], fetched[0]))
        link_free_s, back_s = over_s + seconds, begins_s
    counts = sorted({-(-len(found) * each // _TRIES) for each in range(1, _TRIES + 1)} - {0}, reverse=True)
    return [_traffic(names, spans, found[:count]) for count in counts]


def _traffic(names: Sequence[str], spans: Sequence[Span], which: Sequence[tuple[int, int, int]]) -> Traffic:
    """Write units down, each with those where it is released and fetched."""
    out, back = [0] * len(spans), [0] * len(spans)
    for at, released, fetched in which:
        for other in range(at + 1, released):
            out[other] += spans[at].saved_bytes
        for other in range(at + 1, fetched + 1):
            back[other] += spans[at].saved_bytes
    offloads = tuple(Offload(names[at - 1], names[to - 1], names[back_from - 1]) for at, to, back_from in which)
    return Traffic(offloads, tuple(map(max, out, back)))
