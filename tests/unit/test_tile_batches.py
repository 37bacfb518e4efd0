"""Distribution of the tile batches of one step between processes."""

from __future__ import annotations

import threading
import time

from seesr.runtime.tile_batches import TileBatches


def batches(count: int) -> TileBatches:
    return TileBatches("image", b"context", count, lambda number: b"%d" % number)


def test_every_batch_is_taken_once_and_in_order() -> None:
    step = batches(3)
    assert [step.take() for _ in range(4)] == [0, 1, 2, None]


def test_only_the_first_result_of_a_batch_counts() -> None:
    step = batches(2)
    step.take()
    step.put(0, "first", from_helper=True)
    step.put(0, "second")
    assert step.pop(0) == "first" and step.pop(0) is None
    step.put(0, "third")
    assert step.pop(0) is None and step.from_helpers == {0}


def test_a_batch_that_is_given_back_goes_to_the_next_who_asks() -> None:
    step = batches(2)
    assert (step.take(), step.take()) == (0, 1)
    step.give_back(1)
    step.give_back(1)
    assert (step.take(), step.take()) == (1, None)
    step.put(0, "result")
    step.give_back(0)
    assert step.take() is None


def test_a_result_that_arrives_after_its_batch_was_given_back() -> None:
    step = batches(1)
    step.take()
    step.give_back(0)
    step.put(0, "result")
    assert step.take() is None and step.pop(0) == "result"


def test_an_overdue_batch_is_the_one_that_was_taken_first() -> None:
    step = batches(2)
    assert (step.take(), step.take()) == (0, 1)
    assert step.take_overdue(10) is None
    time.sleep(0.01)
    assert [step.take_overdue(0.005) for _ in range(3)] == [0, 1, None]
    assert batches(1).take_overdue(0) is None


def test_a_waiting_helper_gets_what_another_gives_back_and_ends_with_the_step() -> None:
    step, numbers = batches(1), []
    assert step.take() == 0

    def wait() -> None:
        while (number := step.take_or_wait()) is not None:
            numbers.append(number)

    helper = threading.Thread(target=wait)
    helper.start()
    step.give_back(0)
    end = time.monotonic() + 5
    while not numbers and time.monotonic() < end:
        time.sleep(0.001)
    step.close()
    helper.join(5)
    assert numbers == [0] and not helper.is_alive()
    step.put(0, "late")
    assert step.pop(0) is None
