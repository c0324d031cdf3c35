"""The fork-and-gloo harness: results in rank order, errors with their traceback, nothing left running."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from shoestring.launch import local
from shoestring.launch.local import RankFailed, fork_ranks


def _sum_of_ranks(offset):
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), value, torch.get_num_threads()


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_results_come_in_rank_order_and_may_hold_tensors(world_size):
    results = fork_ranks(world_size, _sum_of_ranks, 10)
    assert [rank for rank, _, _ in results] == list(range(world_size))
    assert all(total.item() == sum(range(10, 10 + world_size)) for _, total, _ in results)
    assert all(threads == 1 for _, _, threads in results)


def _fail_on_rank_1():
    if dist.get_rank() == 1:
        raise KeyError("the reason")
    dist.barrier()


def test_an_error_arrives_with_its_rank_and_traceback_and_ends_the_others():
    with pytest.raises(RankFailed, match=r"(?s)rank 1:.*_fail_on_rank_1.*the reason"):
        fork_ranks(3, _fail_on_rank_1)


def _leave():
    if dist.get_rank() == 0:
        os._exit(7)
    time.sleep(60)


def test_a_rank_that_leaves_without_a_word_is_named():
    with pytest.raises(RankFailed, match="rank 0 ended with exit code 7"):
        fork_ranks(2, _leave)


def _write_pid_and_hang(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def test_ranks_that_hang_are_ended(tmp_path):
    with pytest.raises(RankFailed, match=r"no answer from ranks \[0, 1\] of 2"):
        fork_ranks(2, _write_pid_and_hang, tmp_path, timeout_s=2.0)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _unpicklable():
    return lambda: None


def test_a_result_that_cannot_travel_is_an_error_and_no_hang():
    with pytest.raises(RankFailed, match="pickle"):
        fork_ranks(1, _unpicklable)


def test_ranks_that_do_not_meet_try_again(monkeypatch, tmp_path):
    """Before anything has begun, and not for ever."""
    join = local.world.join

    def fails(*, rank, **meeting):
        with open(tmp_path / f"tries{rank}", "a") as file:
            file.write("x")
        if rank == 1 and (tmp_path / "tries1").read_text() != "x" * 3:
            raise RuntimeError("Gloo connectFullMesh failed")
        join(rank=rank, **meeting)

    monkeypatch.setattr(local.world, "join", fails)
    assert fork_ranks(2, torch.distributed.get_rank) == [0, 1]
    with pytest.raises(local.NotMet, match="connectFullMesh"):
        (tmp_path / "tries1").write_text("x" * 5)
        fork_ranks(2, torch.distributed.get_rank)
    assert len((tmp_path / "tries1").read_text()) == 5 + local.TRIES
