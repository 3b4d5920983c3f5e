"""Requests that run together, joined on dimension 0.

No thread of its own and no waiting where nothing waits: a request that finds its lane idle runs at once, in the thread
that brought it. Requests that come meanwhile wait, and the first of them then runs all that wait, up to the batch size.
So batches grow with the load, and a single client pays nothing.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from keras_dsr.serving.errors import Code, ServingError

Arrays = Mapping[str, np.ndarray]


class _Task:
    """A request that waits or runs."""

    def __init__(self, inputs: Arrays):
        self.inputs = inputs
        self.size = next(iter(inputs.values())).shape[0]
        self.woken = threading.Event()
        self.leads = False
        self.outputs: dict[str, np.ndarray] | None = None
        self.error: Exception | None = None

    def result(self) -> dict[str, np.ndarray]:
        if self.error is not None:
            raise self.error
        return self.outputs


@dataclasses.dataclass
class _Lane:
    """Requests of the same shapes but for dimension 0, one batch of which runs at a time."""

    arrived: threading.Condition
    waiting: deque[_Task] = dataclasses.field(default_factory=deque)


class Batcher:
    """Joins requests to one function.

    Args:
        run: The function: from arrays to arrays, all with the batch on dimension 0.
        max_batch_size: How many examples to join. A larger request runs alone; 1 joins nothing.
        batch_timeout: Seconds that a batch waits to be filled; 0 takes what is there.
        max_queue: How many requests may wait.
        stopped: Once it is set, nothing more begins to run.
        observe: Is told the size of every batch that runs.
    """

    def __init__(
        self,
        run: Callable[[Arrays], dict[str, np.ndarray]],
        *,
        max_batch_size: int,
        batch_timeout: float,
        max_queue: int,
        stopped: threading.Event,
        observe: Callable[[int], None] = lambda size: None,
    ):
        self._run = run
        self._max_batch_size = max_batch_size
        self._batch_timeout = batch_timeout
        self._max_queue = max_queue
        self._stopped = stopped
        self._observe = observe
        self._lock = threading.Lock()
        self._lanes: dict[tuple, _Lane] = {}
        self._queued = 0

    def submit(self, inputs: Arrays, deadline: float | None = None) -> dict[str, np.ndarray]:
        """Runs a request, maybe with others, and gives its own outputs.

        Args:
            inputs: Arrays that `Signature.check` let pass.
            deadline: Until when it may wait, by `time.monotonic`.

        Raises:
            ServingError: UNAVAILABLE if the queue is full or the server has stopped, DEADLINE_EXCEEDED if it waited too
                long, or what the function raised for this request.
        """
        task = _Task(inputs)
        key = tuple((name, array.shape[1:]) for name, array in sorted(inputs.items()))
        with self._lock:
            lane = self._lanes.get(key)
            if lane is None:
                lane = self._lanes[key] = _Lane(threading.Condition(self._lock))
                task.leads = True
            elif self._queued >= self._max_queue:
                raise ServingError(
                    Code.UNAVAILABLE,
                    f"The batch scheduling queue to which this task was submitted is full: {self._queued} requests "
                    "wait. Try again later.",
                )
            else:
                lane.waiting.append(task)
                self._queued += 1
                lane.arrived.notify()
        if not task.leads:
            self._wait(lane, task, deadline)
        if task.leads:
            self._lead(key, lane, task)
        return task.result()

    def _wait(self, lane: _Lane, task: _Task, deadline: float | None) -> None:
        """Until the task was run by another, or leads."""
        if task.woken.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
            return
        with self._lock:
            if task.woken.is_set():
                return
            if task in lane.waiting:
                lane.waiting.remove(task)
                self._queued -= 1
        raise ServingError(Code.DEADLINE_EXCEEDED, "The deadline passed before the request had its turn.")

    def _lead(self, key: tuple, lane: _Lane, task: _Task) -> None:
        """Runs the task with what waits, then hands the lane to the next."""
        batch = [task]
        try:
            if self._stopped.is_set():
                raise ServingError(Code.UNAVAILABLE, "The server has stopped. Send the request to another, or again.")
            batch += self._take(lane, self._max_batch_size - task.size)
            self._run_batch(batch)
        finally:
            with self._lock:
                if lane.waiting:
                    following = lane.waiting.popleft()
                    self._queued -= 1
                    following.leads = True
                    following.woken.set()
                else:
                    del self._lanes[key]
            for other in batch[1:]:
                other.woken.set()

    def _take(self, lane: _Lane, room: int) -> list[_Task]:
        taken: list[_Task] = []
        with self._lock:
            if self._batch_timeout > 0:
                lane.arrived.wait_for(lambda: sum(each.size for each in lane.waiting) >= room, self._batch_timeout)
            while lane.waiting and lane.waiting[0].size <= room:
                taken.append(lane.waiting.popleft())
                room -= taken[-1].size
            self._queued -= len(taken)
        return taken

    def _run_batch(self, batch: list[_Task]) -> None:
        if len(batch) > 1 and self._run_joined(batch):
            return
        # Alone: one request; or several of which one fails, and which of them is not known.
        for task in batch:
            self._observe(task.size)
            try:
                task.outputs = self._run(task.inputs)
            except Exception as error:  # of whatever kind, it belongs to the thread that waits for this task
                task.error = error

    def _run_joined(self, batch: list[_Task]) -> bool:
        """Runs tasks as one; whether that worked."""
        names = batch[0].inputs
        sizes = [task.size for task in batch]
        try:
            outputs = self._run({name: np.concatenate([task.inputs[name] for task in batch]) for name in names})
        except Exception:  # each is run alone next, and raises its own
            return False
        if any(array.shape[:1] != (sum(sizes),) for array in outputs.values()):
            return False
        self._observe(sum(sizes))
        ends = np.cumsum(sizes)
        for task, end in zip(batch, ends, strict=True):
            task.outputs = {name: array[end - task.size : end] for name, array in outputs.items()}
        return True
