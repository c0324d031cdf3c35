"""Groups by name, what is said when a rank does not come, and a second world after the first was dropped."""

import json
import re
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.conf.schema import ParallelConfig
from shoestring.launch import exit_codes
from shoestring.launch.local import fork_ranks
from shoestring.parallel import world
from shoestring.parallel.flight import missing, write_flight
from shoestring.parallel.groups import Mesh
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.transport import DIRECT, CollectiveLost
from shoestring.train.engine import Engine

TIMEOUT_S = 2.0


def parted():
    """Two names part four ranks; one leaves rank 3 out. What each rank's group is called, and the sum of its ranks."""
    rank, found = dist.get_rank(), []
    for name, parts in {"pairs": [[0, 1], [2, 3]], "across": [[0, 2], [1, 3]], "three": [[0, 1, 2]]}.items():
        group = world.part(name, parts, timeout_s=TIMEOUT_S)
        if group is not None:
            total = torch.tensor(rank)
            dist.all_reduce(total, group=group)
            found.append((group.group_desc, total.item(), world.title(group)))
    return found


def test_each_rank_gets_the_one_group_that_holds_it():
    first, _, _, last = fork_ranks(4, parted)
    assert first == [("pairs", 1, '"pairs" (ranks 0 1)'), ("across", 2, '"across" (ranks 0 2)'), ("three", 3, '"three" (ranks 0 1 2)')]
    assert last == [("pairs", 5, '"pairs" (ranks 2 3)'), ("across", 4, '"across" (ranks 1 3)')]


def closed():
    """How many groups torch knows of before a mesh, with it, and after."""
    known = lambda: len(dist.distributed_c10d._world.pg_names)
    before = known()
    mesh = Mesh.create(ParallelConfig(pp=2, edp=1, ep=2), dist.get_rank(), embeds_at_head=True, timeout_s=TIMEOUT_S)
    options = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in (mesh.dense, *mesh.flows.values())}
    during = known()
    dist.barrier()
    mesh.close()
    return before, during, known(), options


def test_a_mesh_gives_its_groups_the_timeout_and_gives_them_back():
    assert fork_ranks(4, closed) == [(1, 8, 1, {TIMEOUT_S})] * 4


# ---------------------------------------------------------------- a rank that does not come

LOST = {
    "all-to-all": lambda x, g: DIRECT.all_to_all(torch.empty(2), x, g),
    "receive from rank 1": lambda x, g: DIRECT.irecv(x, 1, g),
}


def waiting(what, folder):
    """Ranks 0 and 1 add up once; then rank 0 waits for rank 1, which does something else. What rank 0 is told, and after how long."""
    rank, group = dist.get_rank(), world.part("ep F", [[0, 1]], timeout_s=TIMEOUT_S)
    x = torch.ones(2)
    dist.barrier()  # which has more time
    dist.all_reduce(x, group=group)
    if rank == 1:
        write_flight(folder)
        time.sleep(1.5 * TIMEOUT_S)
        return None
    began = time.monotonic()
    try:
        LOST[what](x, group).wait()
    except CollectiveLost as error:
        return str(error), exit_codes.of(error), time.monotonic() - began, write_flight(folder, error)


@pytest.mark.parametrize("what", LOST)
def test_a_rank_that_does_not_come(what, tmp_path):
    message, code, seconds, path = fork_ranks(2, waiting, what, tmp_path, timeout_s=60)[0]
    assert message.startswith(f'{what} over "ep F" (ranks 0 1): ') and "Timed out" in message
    assert code == exit_codes.LOST and seconds < 20 * TIMEOUT_S  # torch's own half hour, if the group were without one
    flight = json.loads(path.read_text())
    assert path == tmp_path / "rank_0.json" and flight["rank"] == 0
    assert f'CollectiveLost: {what} over "ep F"' in "".join(flight["error"])
    assert "in waiting" in "".join(flight["stacks"]["MainThread"])


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch counts gloo's collectives from 2.13 on")
def test_who_has_begun_what(tmp_path):
    """Of the all-to-all, which rank 1 never began. A send is not counted."""
    fork_ranks(2, waiting, "all-to-all", tmp_path, timeout_s=60)
    flight = json.loads((tmp_path / "rank_0.json").read_text())
    (group,) = (g for g in flight["groups"] if g["name"] == "ep F")
    assert TIMEOUT_S / 2 < group.pop("age_s") < 20 * TIMEOUT_S
    assert group == {"name": "ep F", "ranks": [0, 1], "begun": 2, "last": "gloo:all_to_all"}
    assert [(c["group"], c["what"], c["number"]) for c in flight["collectives"]] == [
        ("default_pg", "gloo:barrier", 1),
        ("ep F", "gloo:all_reduce", 1),
        ("ep F", "gloo:all_to_all", 2),
    ]
    said = 'gloo:all_to_all, number 2 over "ep F" (ranks 0 1): '
    assert [str(m) for m in missing(tmp_path)] == [said + "rank 1 has begun 1"]
    (tmp_path / "rank_1.json").unlink()
    assert [str(m) for m in missing(tmp_path)] == [said + "no word from rank 1"]


# ---------------------------------------------------------------- another world

TINY = ["experiment=smoke", "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "train.global_batch_tokens=64"]


def step(ep):
    config = load([*TINY, f"parallel.ep={ep}", "train.micro_batch_sequences=1", f"launch.timeout_s={30 * TIMEOUT_S}"])
    engine = Engine(config)
    rows = torch.randint(300, (4, 17 + config.model.mtp_depth), generator=torch.Generator().manual_seed(0))
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    return engine.train_step([MicroBatch(tokens_BS=r[None, :16], targets_BN=r[None, 1:]) for r in mine], 1e-3).loss


KEPT = []  # as long as this rank lives: it would wait where it lets go


def again(folder):
    """Train on four ranks; two of them are left with a collective that nobody else comes to, drop everything, and train as two."""
    rank = dist.get_rank()
    losses = [step(4)]
    if rank < 2:
        dist.all_reduce(torch.ones(1), async_op=True)
        KEPT.extend(world.abort())
        assert KEPT and not dist.is_initialized()
        world.join(timeout_s=30 * TIMEOUT_S, init_method=f"file://{folder}/again", rank=rank, world_size=2)
        losses.append(step(2))
    return losses


def test_fewer_ranks_join_a_world_after_an_abort():
    with tempfile.TemporaryDirectory() as folder:
        first, second, third, _ = fork_ranks(4, again, folder, timeout_s=100)
    assert first == second and first[0] == third[0]
    assert first[1] == pytest.approx(first[0], rel=1e-5), "the same weights and samples, shared among two"


# ---------------------------------------------------------------- NCCL, of one rank


def every_call():
    """Each call that training makes, on one GPU; not sends, which no rank may make to itself. Names and whether the values stayed."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    world.join(device, timeout_s=60.0, store=dist.HashStore(), rank=0, world_size=1)
    from_torch = sys.modules["shoestring.parallel._torch"]
    group = world.part("alone", [[0]], timeout_s=60.0, max_ctas=8)
    x, out = torch.arange(4.0, device=device), torch.empty(4, device=device)
    calls = {
        "all-to-all": lambda: DIRECT.all_to_all(out, x, group).wait(),
        "all-to-all by rows": lambda: DIRECT.all_to_all(out, x, group, received=[4], sent=[4]).wait(),
        "reduce_scatter": lambda: from_torch.reduce_scatter(out, x, group=group, async_op=True).wait(),
        "all_gather": lambda: from_torch.all_gather(out, x, group=group, async_op=True).wait(),
        "all_reduce": lambda: dist.all_reduce(out.copy_(x), group=group),
        "reduce": lambda: dist.reduce(out.copy_(x), group=group, group_dst=0),
        "broadcast": lambda: dist.broadcast(out.copy_(x), group=group, group_src=0),
        "barrier": lambda: (dist.barrier(group), out.copy_(x)),
        "all_gather_object": lambda: (dist.all_gather_object([None], 1, group=group), out.copy_(x)),
    }
    stayed = {}
    for name, call in calls.items():
        out.zero_()
        call()
        stayed[name] = torch.equal(out, x)
    hosts = world.on_hosts("hosts")
    dist.gather_object(1, [None], dst=0, group=hosts)
    dist.broadcast_object_list([1], group=hosts, group_src=0)
    world.leave()
    return stayed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL wants a GPU")
def test_every_call_of_nccl_with_one_rank():
    stayed = every_call()
    assert all(stayed.values()), stayed


def test_groups_are_made_in_one_place():
    made = re.compile(r"dist\.(new_group|split_group|init_process_group|destroy_process_group|new_subgroups\w*)\(")
    root = Path(world.__file__).parents[1]
    files = {p.relative_to(root).as_posix() for f in ("conf", "kernels", "parallel", "train", "launch") for p in (root / f).rglob("*.py")}
    owners = {"parallel/world.py", "parallel/groups.py"}
    owners |= {"parallel/_torch.py", "launch/bench/links.py"}  # a rehearsal's world without others; what is timed, and ended
    assert {f for f in files if made.search((root / f).read_text())} == owners
