"""Ranks on this machine: forked from one process that has already paid for the imports, meeting over gloo and a file.

Tests and proofs use it (0.1 s for eight ranks). Training uses torch's elastic launcher, which restarts what dies.
"""

import contextlib
import gc
import os
import pickle
import queue
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from ..parallel import world

TRIES = 3  # to meet: gloo now and then takes a connection for one of a group that is gone


class RankFailed(RuntimeError):
    """A forked rank raised, died or did not answer; the message holds its traceback."""


class NotMet(RankFailed):
    """Ranks have not found one another; nothing of what they were to do has begun."""


def fork_ranks(world_size: int, target: Callable, *args, timeout_s: float = 300.0) -> list[Any]:
    """`target(*args)` on each of `world_size` gloo ranks; their results in rank order (pickled, tensors included).

    Each rank runs one thread, with torch.distributed initialised. Every process started here is ended here.
    Raises RankFailed with the first traceback, or naming the ranks that did not answer within `timeout_s`.
    """
    for tries in range(1, TRIES + 1):
        try:
            return _fork(world_size, target, args, timeout_s)
        except NotMet:
            if tries == TRIES:
                raise


def _fork(world_size: int, target: Callable, args: tuple, timeout_s: float) -> list[Any]:
    context = mp.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="shoestring-") as folder:
        meeting = {"init_method": f"file://{folder}/rendezvous", "world_size": world_size, "timeout_s": timeout_s}
        ranks = [context.Process(target=_rank, args=(r, meeting, target, args, results), daemon=True) for r in range(world_size)]
        sys.stdout.flush(), sys.stderr.flush()
        for process in ranks:
            process.start()
        try:
            answers = _collect(ranks, results, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.kill()
            for process in ranks:
                process.join()
    return [pickle.loads(answers[r]) for r in range(world_size)]  # noqa: S301  # nosec B301  # of our own children


def _collect(ranks, results, deadline) -> dict[int, bytes]:
    answers: dict[int, bytes] = {}
    while len(answers) < len(ranks):
        try:
            rank, ok, answer = results.get(timeout=0.2)
        except queue.Empty:
            silent = [r for r, p in enumerate(ranks) if r not in answers]
            dead = [r for r in silent if ranks[r].exitcode is not None]
            if dead and results.empty():
                raise RankFailed(f"rank {dead[0]} ended with exit code {ranks[dead[0]].exitcode} and said nothing") from None
            if time.monotonic() > deadline:
                raise RankFailed(f"no answer from ranks {silent} of {len(ranks)} in time") from None
            continue
        if not ok:
            raise (NotMet if ok is None else RankFailed)(f"rank {rank}:\n{answer}")
        answers[rank] = answer
    return answers


def _rank(rank, meeting, target, args, results):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # what the parent left is not searched for garbage: a third of a second, and copies of all its pages, each time
    torch.set_num_threads(1)
    met = None
    try:
        world.join(rank=rank, **meeting)
        met = False
        answer = (rank, True, pickle.dumps(target(*args)))  # bytes: tensors in a queue would need live file descriptors
    except BaseException:
        answer = (rank, met, traceback.format_exc())
    results.put(answer)
    results.close(), results.join_thread()
    with contextlib.suppress(Exception):
        sys.stdout.flush(), sys.stderr.flush()
    # Others may still be connecting to this rank: stay until the parent, which has all answers then, ends everybody (or is gone).
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.05)
    os._exit(0)
