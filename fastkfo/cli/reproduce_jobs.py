"""Runs all methods, seeds and problems of `fastkfo reproduce`, in one process or several."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context

import torch

from fastkfo.cli.reproduce_problems import Problem
from fastkfo.cli.reproduce_training import Examined, examine

__all__ = ["Done", "cores", "run"]

POLL = 0.2  # seconds within which an interrupt is seen


@dataclass(frozen=True)
class Done:
    """What one method reached from one seed.

    Attributes:
        examined: One entry per exam.
        seconds: Of processor time it took.
    """

    examined: list[Examined]
    seconds: float


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    problems: Sequence[Problem],
    seeds: int,
    processes: int,
    wanted: Callable[[], bool],
    notify: Callable[[float, str], None],
) -> list[Done]:
    """Examines every method of every problem from every seed.

    Results do not depend on the number of processes: each has one thread, and a job's seed decides
    all that it draws.

    Args:
        problems: Which.
        seeds: How many, from 0.
        processes: How many at once; with 1, this one alone.
        wanted: Asked after every job, and of several processes a few times a second; False ends
            the run, and what the processes have begun is lost.
        notify: Called with the share that is done, and what was done last.

    Returns:
        In the order of problems, methods and seeds; of what was done, if it was ended.
    """
    jobs = [(p, kind, seed) for p in problems for kind, _ in p.methods for seed in range(seeds)]
    done: dict[int, Done] = {}
    finished = _one_by_one(jobs) if processes == 1 else _at_once(jobs, processes, wanted)
    for index, result in finished:
        done[index] = result
        problem, kind, seed = jobs[index]
        text = f"{problem.name}, {dict(problem.methods)[kind]}, seed {seed}"
        notify(len(done) / len(jobs), text)
        if not wanted():
            break
    return [done[index] for index in sorted(done)]


Job = tuple[Problem, str, int]


def _work(job: Job) -> Done:
    start = time.process_time()
    return Done(examine(*job), time.process_time() - start)


def _one_by_one(jobs: Sequence[Job]) -> Iterator[tuple[int, Done]]:
    with _one_thread():
        for index, job in enumerate(jobs):
            yield index, _work(job)


def _at_once(
    jobs: Sequence[Job], processes: int, wanted: Callable[[], bool]
) -> Iterator[tuple[int, Done]]:
    others = active_children()
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin) as pool:
        with _ctrl_c_later():
            futures: dict[Future[Done], int] = {
                pool.submit(_work, job): i for i, job in enumerate(jobs)
            }
        left = set(futures)
        try:
            while left and wanted():
                finished, left = wait(left, POLL, FIRST_COMPLETED)
                for future in finished:
                    yield futures[future], future.result()
        finally:
            if left:
                pool.shutdown(wait=False, cancel_futures=True)
                # Jobs that have begun, or are next in a queue, would be finished first.
                for child in active_children():
                    if child not in others:
                        child.terminate()


def _begin() -> None:
    """In a new process: one thread, and Ctrl-C is the parent's."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Until the block ends; to processes made in it, which import torch at first, never."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextmanager
def _one_thread() -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
