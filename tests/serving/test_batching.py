"""Requests that run together get what they would have got alone."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from keras_dsr.serving.batching import Batcher
from keras_dsr.serving.errors import Code, ServingError

pytestmark = pytest.mark.tensorflow_only


class Function:
    """Doubles x; the first run waits until it is let go, so that others gather. Notes the size of every run."""

    def __init__(self):
        self.sizes = []
        self.running, self.go = threading.Event(), threading.Event()

    def __call__(self, inputs):
        self.sizes.append(len(inputs["x"]))
        if not self.running.is_set():
            self.running.set()
            assert self.go.wait(30)
        if (inputs["x"] < 0).any():
            raise ServingError(Code.INVALID_ARGUMENT, "x must be positive")
        return {"y": 2 * inputs["x"]}


def batcher(run, **settings):
    defaults = {"max_batch_size": 8, "batch_timeout": 0.0, "max_queue": 64, "stopped": threading.Event()}
    return Batcher(run, **{**defaults, **settings})


def gathered(requests, until, max_batch_size=8, function=None):
    """Submits one request, the others while it runs; what each gave or raised, and the sizes of the runs."""
    function = function or Function()
    batches = batcher(function, max_batch_size=max_batch_size)

    def submit(x):
        try:
            return batches.submit({"x": x})["y"]
        except ServingError as error:
            return error

    with ThreadPoolExecutor(len(requests)) as threads:
        futures = [threads.submit(submit, requests[0])]
        assert function.running.wait(30)
        for number, x in enumerate(requests[1:], start=1):
            futures.append(threads.submit(submit, x))
            until(lambda number=number: batches._queued == number)
        function.go.set()
        return [future.result(30) for future in futures], function.sizes


def rows(*values):
    return np.array(values, "float32")


def test_what_waits_runs_together(until):
    got, sizes = gathered([rows(1), rows(2, 3), rows(4), rows(5)], until)
    assert sizes == [1, 4]
    assert [each.tolist() for each in got] == [[2], [4, 6], [8], [10]]


def test_up_to_the_batch_size_in_the_order_they_came(until):
    got, sizes = gathered([rows(1), rows(2, 3), rows(4), rows(5, 6), rows(7)], until, max_batch_size=3)
    assert sizes == [1, 3, 3]
    assert [each.tolist() for each in got] == [[2], [4, 6], [8], [10, 12], [14]]


def test_a_larger_request_runs_alone(until):
    got, sizes = gathered([rows(1), rows(*range(10)), rows(2)], until)
    assert sizes == [1, 10, 1]
    assert got[1].tolist() == [2 * value for value in range(10)]


def test_a_batch_size_of_1_joins_nothing(until):
    assert gathered([rows(1), rows(2), rows(3)], until, max_batch_size=1)[1] == [1, 1, 1]


def test_one_that_fails_does_not_spoil_the_others(until):
    got, sizes = gathered([rows(1), rows(2), rows(-1), rows(3)], until)
    assert sizes == [1, 3, 1, 1, 1]
    assert [each.tolist() for each in (got[0], got[1], got[3])] == [[2], [4], [6]]
    assert got[2].code is Code.INVALID_ARGUMENT


def test_outputs_that_do_not_split_run_alone(until):
    class Mean(Function):
        def __call__(self, inputs):
            return {"y": super().__call__(inputs)["y"].mean(keepdims=True)}

    got, sizes = gathered([rows(1), rows(2, 4), rows(5, 5)], until, function=Mean())
    assert sizes == [1, 4, 2, 2]
    assert [each.tolist() for each in got] == [[2], [6], [10]]


def test_other_shapes_do_not_wait():
    function = Function()
    batches = batcher(function)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(batches.submit, {"x": rows(1)})
        assert function.running.wait(30)
        assert batches.submit({"x": np.ones((1, 2), "float32")})["y"].tolist() == [[2, 2]]
        function.go.set()
        first.result(30)


def test_full_queue_and_deadline(until):
    function = Function()
    batches = batcher(function, max_queue=1)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(batches.submit, {"x": rows(1)})
        assert function.running.wait(30)
        second = threads.submit(batches.submit, {"x": rows(2)}, time.monotonic() + 0.5)
        until(lambda: batches._queued == 1)
        with pytest.raises(ServingError, match="is full: 1 requests wait") as error:
            batches.submit({"x": rows(3)})
        assert error.value.code is Code.UNAVAILABLE
        with pytest.raises(ServingError, match="deadline passed") as error:
            second.result(30)
        assert error.value.code is Code.DEADLINE_EXCEEDED
        function.go.set()
        assert first.result(30)["y"].tolist() == [2]
    assert batches._queued == 0
    assert not batches._lanes, "nothing is kept of shapes that came once"


def test_once_it_has_stopped_nothing_more_begins_to_run(until):
    function, stopped = Function(), threading.Event()
    batches = batcher(function, stopped=stopped)
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(batches.submit, {"x": rows(1)})
        assert function.running.wait(30)
        waiting = [threads.submit(batches.submit, {"x": rows(value)}) for value in (2, 3)]
        until(lambda: batches._queued == 2)
        stopped.set()
        function.go.set()
        assert first.result(30)["y"].tolist() == [2]
        for each in waiting:
            with pytest.raises(ServingError, match="has stopped") as error:
                each.result(30)
            assert error.value.code is Code.UNAVAILABLE
    assert function.sizes == [1]
    assert not batches._lanes


def test_timeout_fills_the_batch(until):
    """With a timeout the first waits for others, but no longer than until the batch is full."""
    sizes = []

    def run(inputs):
        sizes.append(len(inputs["x"]))
        return {"y": inputs["x"]}

    batches = batcher(run, max_batch_size=4, batch_timeout=30.0)
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda value: batches.submit({"x": rows(value)})["y"][0], range(4)))
    assert sizes == [4]
    assert got == [0, 1, 2, 3]


def test_many_threads():
    """Every request gets its own answer, whatever it was joined with."""
    sizes = []

    def run(inputs):
        time.sleep(1e-4)
        return {"y": inputs["x"] + 1, "z": inputs["x"] * 2}

    batches = batcher(run, observe=sizes.append)

    def client(seed):
        random = np.random.default_rng(seed)
        for _ in range(100):
            x = random.random((random.integers(1, 5), 2), "float32")
            outputs = batches.submit({"x": x})
            np.testing.assert_array_equal(outputs["y"], x + 1)
            np.testing.assert_array_equal(outputs["z"], x * 2)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(client, range(8)))
    assert max(sizes) > 4, "some ran together"
    assert max(sizes) <= 8
    assert not batches._lanes
