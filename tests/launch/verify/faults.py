"""Mistakes that frameworks have shipped, or would, each made on purpose: `shoestring verify` has to catch every one.

A mistake is a function that breaks the process that calls it (a forked rank: nothing is put back) by putting something else in place of one
of our functions. Its docstring says who makes it. `mistake` says on which case it is tried, and what has to catch it.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from shoestring.kernels.weight_grad import WeightGradStore
from shoestring.launch.verify.cases import Case
from shoestring.launch.verify.command import Request, base_words
from shoestring.parallel import executor, relocate
from shoestring.parallel.dispatch import AllToAllDispatcher, Dispatch
from shoestring.parallel.groups import Mesh
from shoestring.parallel.optimizer import whole
from shoestring.parallel.optimizer.average import Average
from shoestring.parallel.optimizer.whole import WholeOptimizer
from shoestring.parallel.optimizer.zero import Chunk, ShardedOptimizer
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.schedule import SCHEDULES, table
from shoestring.train import engine, phase_run, trainer
from shoestring.train.engine import Engine
from shoestring.train.interop import hf
from shoestring.train.model.decoder import Stage, is_expert
from shoestring.train.model.moe import Router

# A dense block and one with experts; two steps of four sequences.
BASE = base_words(Request(steps=2, words=("model.num_layers=2", "data.seq_len=8", "train.global_batch_tokens=32")))


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """`caught_by`: pattern of how a deviation, or a rank's error, begins; `on`: the layout that the last step is taken again on."""

    make: Callable[[], None]
    case: Case
    on: str
    caught_by: str

    @property
    def name(self) -> str:
        return self.make.__name__


MISTAKES: dict[str, Mistake] = {}


def mistake(layout: str, *options: str, on: str = "", caught_by: str) -> Callable:
    def put(make: Callable[[], None]) -> Callable[[], None]:
        case = Case(layout=layout, options=options, base=BASE)
        MISTAKES[make.__name__] = Mistake(make=make, case=case, on=on, caught_by=caught_by)
        return make

    return put


def instead_of(owner, name: str) -> Callable:
    """Puts the function below in place of `owner.name`, which it gets first."""
    right = getattr(owner, name)

    def put(wrong: Callable) -> None:
        setattr(owner, name, lambda *args, **kwargs: wrong(right, *args, **kwargs))

    return put


def global_norm(owned: Iterable[Chunk]) -> torch.Tensor:
    total = sum((c.data.double().square().sum() for c in owned), torch.zeros((), dtype=torch.float64))
    dist.all_reduce(total)
    return total.sqrt()


# ---------------------------------------------------------------- the norm, and clipping


@mistake("ep2", caught_by="grad_norm of step 1")
def norm_without_experts():
    """Who sums squares over the parameters that all ranks share, and forgets that experts are on one each."""

    @instead_of(ShardedOptimizer, "norm")
    def norm(right, self, scale):
        right(self, scale)
        return global_norm(c for name, c in self.gradients().items() if not is_expert(name))


@mistake("pp2", caught_by="grad_norm of step 1")
def norm_without_the_last_stage():
    """Who reduces the norm over data-parallel ranks, and broadcasts the first stage's."""

    @instead_of(ShardedOptimizer, "norm")
    def norm(right, self, scale):
        right(self, scale)
        return global_norm(c for name, c in self.gradients().items() if self.specs[name].stage == 0)


@mistake("ep2", caught_by="fault of grad_norm in step 1 is .* on rank 0 and .* on rank 1")
def norm_of_own_experts():
    """Who adds experts' squares after the all-reduce: each expert-parallel rank then clips by another coefficient."""

    @instead_of(ShardedOptimizer, "norm")
    def norm(right, self, scale):
        right(self, scale)
        dense = global_norm(c for name, c in self.gradients().items() if not is_expert(name))
        own = [c.data.square().sum() for name, c in self.gradients().items() if is_expert(name)]
        return (dense.square() + sum(own)).sqrt()


@mistake("pp2", "model.tie_embeddings=true", caught_by="grad_norm of step 1")
def norm_with_a_tied_embedding_twice():
    """Who goes through each stage's parameters: the embedding is one of the first and one of the last."""

    @instead_of(ShardedOptimizer, "norm")
    def norm(right, self, scale):
        right(self, scale)
        owned = self.gradients()
        return global_norm([*owned.values(), *(c for name, c in owned.items() if name == "embed")])


# ---------------------------------------------------------------- gradients and their scale


@mistake("ep2", caught_by=r"gradient of layers\.\d\.experts\.(gate_up|down) of expert \d+, step 1")
def expert_gradients_times_ep():
    """Who divides dense gradients by the number of data-parallel ranks, and forgets that an expert has seen all their tokens."""

    @instead_of(WholeOptimizer, "_start")
    def start(right, self, stages):
        for name, spec in self.specs.items():
            if is_expert(name):
                self.main_grad[name].mul_(spec.numel // spec.param.numel())
        right(self, stages)


@mistake("pp2", "model.tie_embeddings=true", caught_by=r".*'embed\.master': elements \[0, \d+\) of \d+ overlap")
def tied_embedding_not_reduced():
    """Who knows one kind of replica only, the data-parallel one: the two copies drift apart. No checkpoint can be written of it."""

    @instead_of(Engine, "_specs")
    def specs(right, self):
        return [dataclasses.replace(s, group=self.mesh.dense) if s.name == "embed" else s for s in right(self)]


@mistake("pp2", "model.tie_embeddings=true", caught_by="gradient of embed, step 1")
def tied_embedding_without_the_head():
    """Who takes the gradient where the embedding is, and not where it is the head."""

    @instead_of(WholeOptimizer, "_start")
    def start(right, self, stages):
        if dist.get_rank() == 1:
            self.main_grad["embed"].zero_()
        right(self, stages)


@mistake("edp2", caught_by=r"gradient of embed, step 1")
def loss_over_local_tokens():
    """Who takes the mean loss of a rank's own tokens and then sums over ranks. Clipping hides it from the update."""

    @instead_of(ShardedOptimizer, "norm")
    def norm(right, self, scale):
        return right(self, scale * dist.get_world_size())


@mistake("edp2", caught_by=r"gradient of layers\.1\.router\.weight, step 1")
def sequence_balance_once_per_rank():
    """Who adds a loss that is a mean already to each rank's gradient, before these are summed. No recorded loss shows it."""

    @instead_of(engine, "Balance")
    def balance(right, *, sequence_coef, **others):
        return right(sequence_coef=sequence_coef * dist.get_world_size(), **others)


@mistake("ep2", caught_by=r"gradient of layers\.1\.router\.weight, step 1")
def weight_gradients_of_another_copy():
    """Who takes gradients of routing weights back in the order of experts, as they arrive, and not of tokens."""

    @instead_of(AllToAllDispatcher, "to_tokens")
    def to_tokens(right, self, rows_RD, weight_R, r, direction):
        rolled = lambda x_TD, weight_TK: (x_TD, weight_TK if weight_TK is None else weight_TK.roll(1, dims=1))
        return right(self, rows_RD, weight_R, r, direction).then(rolled)


def one_gradient_off():
    @instead_of(WholeOptimizer, "_start")
    def start(right, self, stages):
        if "layers.1.experts.down" in self.main_grad:
            self.main_grad["layers.1.experts.down"][3].mul_(1 + 1e-4)
        right(self, stages)


@mistake("pp2", caught_by=r"gradient of layers\.1\.experts\.down of expert 3, step 1, rank 1")
def one_part_in_ten_thousand_in_fp64():
    """Whoever writes an epsilon into a divisor."""
    one_gradient_off()


@mistake("pp2", "precision=fp32", caught_by=r"gradient of layers\.1\.experts\.down of expert 3, step 1, rank 1")
def one_part_in_ten_thousand_in_fp32():
    """Whoever writes an epsilon into a divisor."""
    one_gradient_off()


# ---------------------------------------------------------------- the batch


@mistake("edp2", caught_by="loss of step 1")
def last_micro_batch_dropped():
    """Who counts micro-batches from one where the others count from zero."""

    @instead_of(executor.Executor, "step")
    def step(right, self, batches, **how):
        return right(self, batches[:-1], **how)


@mistake("edp2", caught_by="data position of step 1 on pipeline rank 0 read samples")
def ranks_read_the_same_samples():
    """Who seeds or shards the loader by a rank that is zero everywhere."""

    @instead_of(phase_run.PhaseRun, "_read")
    def read(right, self, *args):
        self.dp_rank = 0
        return right(self, *args)


@mistake("pp1", "model.mtp_depth=2", caught_by=r"mtp_loss\.0 of step 1")
def labels_of_two_prediction_modules_swapped():
    """Who counts how far a module looks ahead from the end."""

    @instead_of(Stage, "_prediction_head")
    def prediction_head(right, self, block):
        return right(self, SimpleNamespace(head_norm=block.head_norm, depth=3 - block.depth))


@mistake("pp2edp2", "model.mtp_depth=2", caught_by=r"mtp_loss\.0 of step 1")
def prediction_labels_one_place_early():
    """Who gives a prediction module the label of the head before it."""

    @instead_of(Stage, "_prediction_head")
    def prediction_head(right, self, block):
        return right(self, SimpleNamespace(head_norm=block.head_norm, depth=block.depth - 1))


# ---------------------------------------------------------------- schedules: their lists, their messages, their closures

LATE = ("pp2/zbv", "model.num_layers=4")  # whose weight gradients have actions of their own


def list_without(kinds: str):
    """What a schedule makes, less the first of a rank's actions that consist of these kinds of ops."""

    @instead_of(engine, "proven")
    def proven(right, schedule, *layout):
        made = SCHEDULES[schedule].actions(*layout)
        gone = next(action for action in made[0] if "".join(op.kind for op in action) == kinds)
        made[0].remove(gone)
        lists = SCHEDULES | {schedule: dataclasses.replace(SCHEDULES[schedule], actions=lambda *layout: made)}
        table.SCHEDULES = lists
        return right(schedule, *layout)


@mistake("pp2/dualpipe", caught_by="ValueError: rank 0 has F for stage 0, micro-batch 0: want F and B")
def pair_forgotten():
    """Whose generator leaves out one overlapped action of the steady state."""
    list_without("FB")


@mistake(*LATE, caught_by=r"ValueError: rank 0 has FI for stage \d, micro-batch \d: want F and B, or F, I and W")
def weights_action_forgotten():
    """Whose list ends with its last input gradient."""
    list_without("W")


@mistake(*LATE, caught_by=r"AssertionError: the action list ended with work left over: \['deferred'\]")
def weights_action_lost_after_the_proof():
    """Who edits a list that was right."""

    @instead_of(executor.Executor, "_run")
    def run(right, self, actions, *args, **how):
        actions = list(actions)
        actions.remove(next(action for action in actions if [op.kind for op in action] == ["W"]))
        return right(self, actions, *args, **how)


@mistake(*LATE, caught_by=r"gradient of layers\.\S+, step 1")
def closure_never_run():
    """Who takes what waits for a block's weights when its first linear is done, not its last."""

    @instead_of(WeightGradStore, "take")
    def take(right, self):
        return right(self)[:-1]


@mistake(*LATE, caught_by=r"gradient of layers\.\S+, step 1")
def closures_run_twice():
    """Who runs what waits beside an exchange, and again where its W action stands."""

    @instead_of(WeightGradStore, "take")
    def take(right, self):
        taken = right(self)
        return [*taken, *taken[-1:]]


@mistake("pp2", caught_by="loss of step 1")
def two_forwards_sent_in_the_other_order():
    """Who sends what is ready first."""
    held = {}

    @instead_of(executor._Step, "_hand_over")
    def hand_over(right, self, kind, op, stage, tensor):
        if kind == "F" and op.micro_batch % 2 == 0:
            held[op.micro_batch] = op, stage, tensor
            return
        right(self, kind, op, stage, tensor)
        if kind == "F":
            right(self, kind, *held.pop(op.micro_batch - 1))


@mistake(*LATE, caught_by="loss of step 1")
def one_group_for_both_directions():
    """Who makes a communicator per neighbour: in a V, forwards one way and gradients the other go from the same rank to the same rank."""

    @instead_of(Mesh, "flow")
    def flow(right, self, kind, stage, other, direction):
        rank, _ = right(self, kind, stage, other, direction)
        return rank, self.flows["F", 0, 0]


# ---------------------------------------------------------------- routing and experts


@mistake("ep2", caught_by="loss of step 1")
def route_scale_forgotten():
    """Who normalises the weights last."""

    @instead_of(Router, "forward")
    def forward(right, self, *args, **kwargs):
        weight_TK, routing = right(self, *args, **kwargs)
        return weight_TK / self.routes.route_scale, routing


@mistake("ep2", caught_by="loss of step 1")
def weights_of_another_copy():
    """Who permutes tokens and weights by two index arrays."""

    @instead_of(AllToAllDispatcher, "to_experts")
    def to_experts(right, self, x_TD, weight_TK, r, direction):
        return right(self, x_TD, None if weight_TK is None else weight_TK.roll(1, dims=1), r, direction)


@mistake("ep2", caught_by="loss of step 1")
def tokens_of_a_peer_dropped():
    """Who has a capacity, and fills it peer by peer."""

    @instead_of(AllToAllDispatcher, "_exchange")
    def exchange(right, self, rows, out_rows, in_rows, direction):
        def drop(out: torch.Tensor) -> tuple:
            out[out_rows[0] :].zero_()
            return (out,)

        pending = right(self, rows, out_rows, in_rows, direction)
        return pending.then(drop) if dist.get_rank() == 0 else pending


@mistake("edp2", "train.recompute=[attention]", caught_by=r"expert load of MoE layer 0, step 1: 128 ")
def counted_again_when_recomputed():
    """Who counts in the router's forward, which recompute runs twice."""

    @instead_of(Dispatch, "__init__")
    def init(right, self, dispatcher, observe):
        right(self, dispatcher, lambda routing: None)

    @instead_of(Stage, "_attend_and_route")
    def attend_and_route(right, self, layer, block):
        compute, stats = right(self, layer, block), self.stats[layer]

        def counting(batch: MicroBatch, *values) -> tuple:
            h_TD, u_TD, weight_TK, r, *carried = compute(batch, *values)
            stats.observe(dataclasses.replace(r, load_E=torch.bincount(r.expert_TK.flatten(), minlength=self.m.num_experts)))
            return h_TD, u_TD, weight_TK, r, *carried

        return counting


@mistake("edp2", caught_by=r"selection bias of layers\.1\.router, step 1")
def bias_from_local_counts():
    """Who forgets that balance is meant over the global batch."""

    @instead_of(Engine, "_reduce_counts")
    def reduce_counts(right, self, *args):
        self.local = torch.stack([stats.load_E for stage in self.stages.values() for stats in stage.stats.values()])
        return right(self, *args)

    @instead_of(Engine, "_update_biases")
    def update_biases(right, self, loads):
        right(self, self.local)


@mistake("ep2", caught_by="fault of selection biases in step 1 differ between rank 0 and rank 1")
def bias_not_moved_on_one_rank():
    """Who treats the bias as a buffer that data parallelism broadcasts: nobody does, here."""

    @instead_of(Engine, "_update_biases")
    def update_biases(right, self, loads):
        if dist.get_rank() != 1:
            right(self, loads)


@mistake("pp2/interleaved_1f1b", "model.num_layers=4", "train.global_batch_tokens=64", caught_by="loss of step 1")
def chunks_of_an_interleaved_schedule_swapped():
    """Who gives a rank its chunks one after the other, and not one per round."""

    @instead_of(engine, "stage_layers")
    def stage_layers(right, config):
        stages = right(config)
        return [*stages[:1], *reversed(stages[1:-1]), *stages[1:][-1:]]


# ---------------------------------------------------------------- the update


@mistake("edp2", caught_by="fault of .* on rank 1 in step 1 is not its master")
def stale_weights_on_one_replica():
    """Who computes with gathered weights before the all-gather has arrived."""

    @instead_of(WholeOptimizer, "_publish")
    def publish(right, self):
        before = [b.weights.clone() for b in self._buffers]
        right(self)
        for b, stale in zip(self._buffers, before):
            if dist.get_rank() == 1:
                b.weights[: b.owned.start] = stale[: b.owned.start]


@mistake("edp2", caught_by=r"weight of (norm|layers\.\d\.\w*(\.\w+)?_norm), step 1")
def weight_decay_on_norms():
    """Who decays all parameters alike."""

    @instead_of(Engine, "_specs")
    def specs(right, self):
        return [dataclasses.replace(s, decay=True) for s in right(self)]


@mistake("edp2", "optim.algorithm=muon", caught_by=r"weight of layers\.\d\.\S+, step 1")
def muon_of_half_a_matrix():
    """Who shards a matrix first and orthogonalises each rank's rows."""

    @instead_of(whole, "muon_")
    def muon(right, master, grad, momentum, matrices, **settings):
        halves = [(rows // 2, columns) for rows, columns in matrices for _ in range(2)]
        right(master, grad, momentum, halves, **settings)


@mistake("edp2", "optim.ema_decay=0.9", caught_by="average of embed, step 1")
def average_one_step_late():
    """Who averages the weights where the next step begins, and saves before that."""
    Average.update = lambda self: None

    @instead_of(Average, "begin")
    def begin(right, self, *, anew=False):
        right(self, anew=anew)
        self._add([])


@mistake("edp2", caught_by="weight of embed, step 2")
def schedule_one_step_ahead():
    """Who steps the learning rate's schedule before the optimizer."""

    @instead_of(phase_run.PhaseRun, "learning_rate")
    def learning_rate(right, self, step):
        return right(self, step + 1)


# ---------------------------------------------------------------- saving, resuming, exporting


@mistake("ep2", on="pp2", caught_by=r"resumed state of layers\.1\.experts\.down\.master after step 1 on pp2")
def two_experts_swapped_on_resume():
    """Who sorts experts by name: 10 comes before 2."""

    @instead_of(ShardedOptimizer, "load_state")
    def load_state(right, self, steps):
        for name, c in self.state().items():
            if is_expert(name):
                slabs = c.data.view(16, -1)
                slabs[[2, 10]] = slabs[[10, 2]]
        right(self, steps)


@mistake("pp2", on="edp2", caught_by=r"resumed state of \S+\.exp_avg_sq after step 1 on edp2")
def second_moments_not_restored():
    """Who makes the optimizer anew and loads what it has so far: nothing."""

    @instead_of(ShardedOptimizer, "load_state")
    def load_state(right, self, steps):
        for name, c in self.state().items():
            if name.endswith(".exp_avg_sq"):
                c.data.zero_()
        right(self, steps)


@mistake("pp2", on="edp2", caught_by="resumed weight of embed, step 2")
def step_count_lost_on_resume():
    """Who restores AdamW's moments and corrects their bias as if they had just begun."""

    @instead_of(ShardedOptimizer, "load_state")
    def load_state(right, self, steps):
        right(self, 0)


@mistake("ep2", on="edp2", caught_by=r"resumed state of layers\.1\.router\.bias after step 1 on edp2")
def bias_not_restored():
    """Who loads into a copy of what is not a parameter."""

    @instead_of(Engine, "chunks")
    def chunks(right, self, *, saving):
        held = right(self, saving=saving)
        return held if saving else {n: Chunk(c.numel, c.offset, c.data.clone()) if n.endswith(".bias") else c for n, c in held.items()}


@mistake("pp2", on="edp2", caught_by="resumed data position of step 2 on pipeline rank 0 read samples")
def samples_read_again_after_resume():
    """Who restores the step and makes the loader anew."""

    @instead_of(trainer._Session, "_load")
    def load(right, self, start):
        right(self, start)
        self.progress.sample = 0


@mistake("pp2", on="edp2", caught_by="random state of rank 0 after step 1 on edp2")
def random_state_not_restored():
    """Who saves it and never looks at it again."""
    torch.set_rng_state = lambda state: None


@mistake("ep2", "parallel.placement_interval=1", on="pp2ep2", caught_by=r"resumed state of layers\.1\.experts\.")
def placement_not_saved():
    """Who moves experts between ranks and saves their slabs as they lie."""
    relocate.Placement.state = lambda self: {}


@mistake("pp2", caught_by="exported logits of the model after the last step")
def experts_exported_in_another_order():
    """Who converts a checkpoint with file names for numbers."""

    @instead_of(hf, "pieces")
    def pieces(right, m):
        sorted_by_name = sorted(range(m.num_experts), key=str)
        for p in right(m):
            number = re.search(r"\.experts\.(\d+)\.", p.name)
            if number:
                name = p.name.replace(number[0], f".experts.{sorted_by_name[int(number[1])]}.")
                p = dataclasses.replace(p, name=name)
            yield p
