"""Gradients that are thrown away leave no trace: what follows is bit for bit what it would have been. And made again, they are the same."""

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.parallel.optimizer import deepspeed_zero
from shoestring.parallel.phases import MicroBatch
from shoestring.train.engine import Engine

BASE = ["model=micro", "model.num_layers=3", "data=synthetic", "data.seq_len=16", "train.micro_batch_sequences=1", "optim.warmup_steps=1"]
CASES = {
    "adamw": ["parallel.pp=2", "parallel.edp=2", "train.global_batch_tokens=128"],
    "late weight gradients, fp8": [
        *("parallel.pp=2", "parallel.ep=2", "parallel.schedule=zbv", "parallel.chunks=2", "model.num_layers=4", "precision=fp8"),
        *("train.global_batch_tokens=128", "precision.sentinel_interval=1"),
    ],
    "muon, an average": ["parallel.ep=2", "optim.algorithm=muon", "optim.ema_decay=0.9", "train.global_batch_tokens=128"],
    "on the host": ["parallel.ep=2", "optim.offload=true", "train.global_batch_tokens=128"],
    "deepspeed": ["parallel.ep=2", "optim.engine=deepspeed", "train.global_batch_tokens=128"],
}


def batches(config, seed):
    rows = torch.randint(
        config.model.vocab_size, (config.num_micro_batches, config.data.seq_len + 1), generator=torch.Generator().manual_seed(seed)
    )
    return [MicroBatch(tokens_BS=row[None, :-1], targets_BN=row[None, 1:]) for row in rows]


def state(engine):
    kept = {name: chunk.data.clone() for name, chunk in engine.chunks(saving=True).items()}
    return kept | {name: param.detach().clone() for name, param in engine.parameters().items()}


def job(words):
    config, seen = load(words), []
    for thrown in (False, True):
        engine = Engine(config)
        for step in range(2):  # the second begins with what the first has left
            if thrown:
                engine.gradients(batches(config, 100 + step))
                engine.discard()
                first = engine.gradients(batches(config, step))
                engine.discard()
            again = engine.gradients(batches(config, step))
            assert not thrown or (first.loss, first.grad_norm, first.totals.loads.tolist()) == (
                again.loss, again.grad_norm, again.totals.loads.tolist(),
            )  # fmt: skip
            result = engine.apply(again, 1e-3)
        seen.append((result.loss, state(engine)))
    (loss, plain), (loss_thrown, left) = seen
    return loss == loss_thrown and plain.keys() == left.keys() and all(torch.equal(plain[name], left[name]) for name in plain)


@pytest.mark.parametrize("case", CASES)
def test_no_trace(case):
    words = [*BASE, *CASES[case]]
    if "deepspeed" in case:
        deepspeed_zero.preload()
    assert all(fork_ranks(load(words).parallel.world_size, job, words))
