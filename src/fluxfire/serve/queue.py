"""The queue: pictures that wait, bounded by what they cost, taken in batches of equal shape.

Cost is pixels x steps, so that one picture of 1024x1024 counts as much as 64 of 128x128. How long a cost takes is
measured with every batch; what a full queue tells its clients (`Retry-After`) is the time until the batch under way and
enough of what waits is done.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict

from fluxfire.serve.errors import ServeError
from fluxfire.serve.jobs import Job, Picture


class Pace:
    """Seconds per unit of cost, as a running mean over the last batches."""

    def __init__(self) -> None:
        self.seconds_per_cost: float | None = None

    def add(self, cost: int, seconds: float) -> None:
        """Counts a batch: a fifth of what is new, the rest of what was."""
        new = seconds / cost
        old = self.seconds_per_cost
        self.seconds_per_cost = new if old is None else 0.8 * old + 0.2 * new

    def seconds(self, cost: int, since: float = 0.0) -> float:
        """How long this still takes, begun so many seconds ago; 0 before anything was measured."""
        return max(0.0, cost * (self.seconds_per_cost or 0) - since)


class PictureQueue:
    """Pictures in the order in which they came.

    Args:
        limit: most cost that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.cost = 0
        self.pace = Pace()
        self.under_way: tuple[int, float] | None = None  # the cost of the batch that is made, and when it began
        self._waiting: OrderedDict[Picture, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether even the smallest picture would be too much."""
        return self.cost >= self.limit

    def add(self, job: Job) -> None:
        """Puts a job's pictures at the end.

        Raises:
            ServeError: 429 when it does not fit now; 422 when it never would.
        """
        cost = job.order.cost
        if cost > self.limit:
            message = f"costs {cost} pixels x steps, this server takes {self.limit} at once: ask for less"
            raise ServeError(422, message, code="too_expensive")
        if self.cost + cost > self.limit:
            raise self.refusal(cost)
        for index in range(len(job.order.seeds)):
            self._waiting[Picture(job, index)] = None
        self.cost += cost

    def refusal(self, cost: int = 1) -> ServeError:
        """The answer when something of this cost does not fit; it is never told to come in less than a second."""
        wait = self.pace.seconds(self.cost + cost - self.limit)
        if self.under_way:
            running, begun = self.under_way
            wait += self.pace.seconds(running, time.monotonic() - begun)
        return ServeError(429, "the queue is full", code="queue_full", retry_after_s=max(1, math.ceil(wait)))

    def take(self, most: int, pixels_at_once: int | None) -> list[Picture]:
        """The next batch: the first that waits, and those after it of the same shape, as many as fit."""
        if not self._waiting:
            return []
        shape = next(iter(self._waiting)).job.order.shape
        if pixels_at_once is not None:
            most = min(most, max(1, pixels_at_once // shape.pixels))
        batch: list[Picture] = []
        for picture in self._waiting:
            if len(batch) == most:
                break
            if picture.job.order.shape == shape:
                batch.append(picture)
        for picture in batch:
            self._drop(picture)
        return batch

    def places(self) -> dict[Job, int]:
        """For each job that waits, how many pictures wait before its first."""
        places: dict[Job, int] = {}
        for ahead, picture in enumerate(self._waiting):
            places.setdefault(picture.job, ahead)
        return places

    def remove(self, job: Job) -> None:
        """Takes out what still waits of a job."""
        for picture in [picture for picture in self._waiting if picture.job is job]:
            self._drop(picture)

    def _drop(self, picture: Picture) -> None:
        del self._waiting[picture]
        self.cost -= picture.job.order.shape.cost
