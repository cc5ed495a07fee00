"""Evaluation in other processes: order, errors, and an end in every case."""

import gc
import multiprocessing
import os
import time

import pytest

from kmax_d2.evaluation.pool import PENDING, EvaluationPool


def _fail_with_processes(submitted):
    pool = EvaluationPool(print)
    pool.submit(submitted, 0)
    raise ValueError("something else")


@pytest.mark.parametrize("submitted", [abs, "no function"])
def test_a_process_that_fails_ends(submitted):
    """Else the other processes of a training would wait for it."""
    process = multiprocessing.get_context("fork").Process(target=_fail_with_processes, args=(submitted,))
    process.start()
    process.join(20)
    assert process.exitcode == 1


def _report_and_wait(pipe):
    pipe.send(os.getpid())
    time.sleep(60)


def _submit_and_wait(pipe):
    pool = EvaluationPool(print)
    pool.submit(_report_and_wait, pipe)
    pool.finish()


def test_helper_processes_end_with_a_killed_parent():
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_submit_and_wait, args=(sender,))
    process.start()
    sender.close()
    helper = receiver.recv()
    process.kill()
    process.join()
    with pytest.raises(EOFError):  # once no process has the other end
        assert receiver.poll(20), f"process {helper} is still there"
        receiver.recv()


def _square(value):
    return value, value**2, os.getpid()


def test_results_come_in_order_from_other_processes():
    results = []
    pool = EvaluationPool(results.append)
    count = 3 * PENDING * pool.workers
    for value in range(count):
        pool.submit(_square, value)
        assert len(pool.pending) <= PENDING * pool.workers
    pool.finish()
    assert [result[:2] for result in results] == [(value, value**2) for value in range(count)]
    assert os.getpid() not in {result[2] for result in results}


def test_an_error_is_raised_and_the_pool_can_go_on():
    results = []
    pool = EvaluationPool(results.append)
    pool.submit(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        pool.finish()
    pool.submit(int, "7")
    pool.finish()
    assert results == [7]


def test_the_processes_of_a_pool_that_is_given_up_end():
    """As after an error in another evaluator, in a notebook that goes on."""
    before = set(multiprocessing.active_children())
    pool = EvaluationPool(print)
    pool.submit(abs, 0)
    processes = set(multiprocessing.active_children()) - before
    assert processes
    del pool
    gc.collect()
    assert not processes & set(multiprocessing.active_children())
