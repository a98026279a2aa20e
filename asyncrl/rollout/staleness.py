"""The staleness bound: when a group may be admitted, and what becomes of one that is too old.

B groups are one optimizer batch, O is the bound. The budget has

    slots = (O + 1) B

A group holds a slot from its admission until weights trained on it are live in the sampler, or until it
leaves without having been trained. docs/staleness.md derives from this, and from the order of the queue,
that under `wait` no token is trained more than O steps after the version that drew it, also where O moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from asyncrl.rollout.held import Reason


class StalenessBudget:
    """Owns the slots. Pure: no clock, no task.

    `most_groups` caps the groups that are trained in the whole run, so that a run with `max_steps` begins no
    rollout that could never be trained.
    """

    def __init__(self, slots: int, most_groups: int | None = None) -> None:
        assert slots >= 1
        self.slots = slots
        self.in_use = 0
        self._most = most_groups
        self._kept = 0
        self.used = 0
        """Groups that optimizer steps have used, since the start of the run."""
        self._awaiting: deque[tuple[int, int]] = deque()

    @property
    def free(self) -> int:
        """Groups that may be admitted. 0 too while more slots are in use than there still are."""
        return max(0, self.slots - self.in_use)

    def resize(self, slots: int) -> None:
        """The bound has moved."""
        assert slots >= 1
        self.slots = slots

    def can_admit(self) -> bool:
        return self.free > 0 and (self._most is None or self._kept < self._most)

    @property
    def held_by(self) -> Reason:
        """Why no group may begin."""
        if self.free > 0:
            return "data"  # `most_groups` have begun
        return "unpublished" if self._awaiting else "budget"

    def admit(self) -> None:
        """A group begins and takes a slot."""
        assert self.can_admit()
        self.in_use += 1
        self._kept += 1

    def leave(self) -> None:
        """An admitted group was filtered, rejected or sent back: it will not be trained."""
        self.in_use -= 1
        self._kept -= 1
        assert self.in_use >= 0

    def trained(self, groups: int, step: int) -> None:
        """Optimizer step number `step` (from 1) used `groups` groups: their slots return when it is live."""
        self._awaiting.append((step, groups))
        self.used += groups

    def go_on(self, used: int, ahead: int | None) -> None:
        """An earlier life of this run used so many groups, and the weights of all of them are live; at most `ahead` are
        still to be trained. Batches may have had another size, and the run another end."""
        assert self._kept == self.used == 0
        self._kept = self.used = used
        self._most = None if ahead is None else used + ahead

    def published(self, version: int) -> None:
        """Weights of `version` steps are live: the slots of their groups come free."""
        while self._awaiting and self._awaiting[0][0] <= version:
            self.in_use -= self._awaiting.popleft()[1]
        assert self.in_use >= 0


Verdict = Literal["train", "mask", "requeue", "drop"]


def judge(oldest_versions: Sequence[int], step: int, max_staleness: int, on_stale: Verdict) -> Verdict:
    """What becomes of a group when `step` optimizer steps have been taken.

    `oldest_versions` holds, for each sample, the version of its oldest loss token.
    """
    return "train" if step - min(oldest_versions) <= max_staleness else on_stale


def mask_stale(loss_mask: Sequence[int], versions: Sequence[int], oldest_allowed: int) -> list[int]:
    """The loss mask [N] without the tokens that were drawn by weights older than `oldest_allowed`."""
    return [
        int(bool(trained) and version >= oldest_allowed) for trained, version in zip(loss_mask, versions, strict=True)
    ]
