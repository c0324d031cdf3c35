"""What an owner has, by formula, against the optimizer that is built: weights in their order, ranges, pieces and state."""

import pytest
from shoestring.conf.compose import load
from shoestring.launch.rehearse.rank import META, rehearsable
from shoestring.parallel import world
from shoestring.parallel._torch import join_alone
from shoestring.train import cost
from shoestring.train.engine import Engine
from shoestring.train.owned import owned, weights
from shoestring.train.rank_share import rank_share

BASE = ["model=micro", "data=synthetic", "data.seq_len=64", "model.num_layers=4", "model.mtp_depth=1", "train.global_batch_tokens=4096"]
CASES = {
    "one rank, no latent of queries": ["model.q_lora_rank=0"],
    "both ends apart": ["parallel.pp=2", "parallel.edp=2", "parallel.ep=2", "precision=bf16"],
    "both ends here": ["parallel.pp=2", "parallel.chunks=2", "parallel.schedule=dualpipev", "parallel.ep=2", "model.tie_embeddings=true"],
    "muon": ["parallel.pp=2", "parallel.edp=2", "parallel.ep=2", "optim.algorithm=muon", "precision=bf16", "optim.moments=bf16"],
    "replicas in the pipeline": ["parallel.pp=2", "parallel.schedule=dualpipe", "parallel.ep=2", "model.num_shared_experts=0"],
}


@pytest.mark.parametrize("words", CASES.values(), ids=CASES)
def test_as_built(words):
    config = rehearsable(load([*BASE, *words]))
    p = config.parallel
    for rank in range(p.world_size):
        join_alone(p.world_size, rank)
        try:
            engine = Engine(config, META)
        finally:
            world.leave()
        share = rank_share(config, rank // p.dp)
        built = [(s.name, tuple(s.param.shape), s.stage, s.matrices) for s in engine.optimizer.specs.values()]
        assert [(w.name, w.shape, w.stage, w.matrices) for w in weights(config, share)] == built
        mine, optimizer = owned(config, share, edp_rank=rank // p.ep % p.edp, ep_rank=rank % p.ep), engine.optimizer
        assert [(piece.numel, piece.matrices) for piece in mine.pieces] == [(len(p.grad), p.spec.matrices) for p in optimizer._pieces]
        assert mine.numel == sum(len(buffer.master) for buffer in optimizer._buffers)
        held = {id(storage): storage.nbytes() for c in optimizer.state().values() for storage in [c.data.untyped_storage()]}
        if config.precision.compute == "fp32":  # weights are their own masters
            held = {key: n for key, n in held.items() if key not in {id(b.weights.untyped_storage()) for b in optimizer._buffers}}
        filled = mine.numel - sum(piece.numel for piece in mine.pieces)  # up to whole cache lines: moments have none
        assert 0 <= cost.owned_bytes(config, mine.numel, mine.numel_by_muon) - sum(held.values()) <= 2 * 4 * filled
