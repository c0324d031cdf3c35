"""What a model weighs, computes and costs: parameters, FLOPs per token, bytes of training state, MFU and dollars.

Pure functions of the configuration. Live metrics, plans and reports all call them; hardware figures come from conf/cluster/*.yaml.
FLOPs count a multiply and an add as two, and count what the mathematics needs: recomputed activations are not useful work,
so the utilisation here is MFU, never HFU.
"""

from dataclasses import dataclass

from ..conf.schema import ClusterConfig, Config, ModelConfig, ParallelConfig

ELEMENT_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4, "fp64": 8}


# ---------------------------------------------------------------- parameters


@dataclass(frozen=True, kw_only=True)
class BlockParams:
    """Parameters of one transformer block. The router's selection bias is a buffer, not a parameter, and is not here."""

    attention: int
    dense_mlp: int  # of a block without routing, else 0
    router: int
    experts: int  # routed, all of them
    active_experts: int  # routed, those that one token meets
    shared: int
    norms: int  # two of the block, those of the two latents of attention

    @property
    def dense(self) -> int:
        """Everything but the routed experts: what is replicated over data-parallel ranks."""
        return self.attention + self.dense_mlp + self.router + self.shared + self.norms

    @property
    def total(self) -> int:
        return self.dense + self.experts

    @property
    def active(self) -> int:
        return self.dense + self.active_experts

    @property
    def active_matrices(self) -> int:
        """Of these, the ones in matrix products: each costs one multiply-add a token."""
        return self.active - self.norms


@dataclass(frozen=True, kw_only=True)
class ParamCount:
    """Parameters of a model, by kind and by block. A tied head is the embedding and counts once in `total`.

    Modules of multi-token prediction serve training: they are in `trained`, and in nothing else here.
    """

    embedding: int
    head: int  # 0 where tied
    final_norm: int
    active_head: int  # the product with the vocabulary happens whether or not its matrix is tied
    blocks: tuple[BlockParams, ...]
    predictions: tuple[BlockParams, ...] = ()  # `merge` counts as attention, three more norms as norms

    @property
    def trained(self) -> int:
        return self.total + sum(b.total for b in self.predictions)

    @property
    def attention(self) -> int:
        return sum(b.attention for b in self.blocks)

    @property
    def dense_mlp(self) -> int:
        return sum(b.dense_mlp for b in self.blocks)

    @property
    def router(self) -> int:
        return sum(b.router for b in self.blocks)

    @property
    def experts(self) -> int:
        return sum(b.experts for b in self.blocks)

    @property
    def shared(self) -> int:
        return sum(b.shared for b in self.blocks)

    @property
    def norms(self) -> int:
        return self.final_norm + sum(b.norms for b in self.blocks)

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.final_norm + sum(b.total for b in self.blocks)

    @property
    def active(self) -> int:
        """Parameters that act on one token; the head counted, the embedding (a look-up) not: DeepSeek-V3's convention."""
        return self.active_head + self.final_norm + sum(b.active for b in self.blocks)


def num_params(model: ModelConfig) -> ParamCount:
    table = model.vocab_size * model.dim
    return ParamCount(
        embedding=table, head=0 if model.tie_embeddings else table, active_head=table, final_norm=model.dim,
        blocks=tuple(block_params(model, layer) for layer in range(model.num_layers)),
        predictions=tuple(block_params(model, layer) for layer in range(model.num_layers, model.num_blocks)),
    )  # fmt: skip


def block_params(model: ModelConfig, layer: int) -> BlockParams:
    """Of block `layer` (0-based); the first `num_dense_layers` have no routing, those from `num_layers` on predict further tokens."""
    m = model
    attention = (
        (m.dim * m.q_lora_rank + m.q_lora_rank * m.num_heads * m.qk_head_dim if m.q_lora_rank else m.dim * m.num_heads * m.qk_head_dim)
        + m.dim * (m.kv_lora_rank + m.qk_rope_head_dim)
        + m.kv_lora_rank * m.num_heads * (m.qk_nope_head_dim + m.v_head_dim)
        + m.num_heads * m.v_head_dim * m.dim
    )
    routed, predicts = m.num_moe_layers > 0 and layer >= m.num_dense_layers, layer >= m.num_layers
    expert = 3 * m.dim * m.expert_hidden_dim  # gate, up, down
    return BlockParams(
        attention=attention + (2 * m.dim * m.dim if predicts else 0),
        dense_mlp=0 if routed else 3 * m.dim * m.dense_hidden_dim,
        router=m.num_experts * m.dim if routed else 0,
        experts=m.num_experts * expert if routed else 0,
        active_experts=m.top_k * expert if routed else 0,
        shared=3 * m.dim * m.shared_hidden_dim if routed else 0,
        norms=(5 if predicts else 2) * m.dim + m.q_lora_rank + m.kv_lora_rank,
    )


# ---------------------------------------------------------------- FLOPs


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """FLOPs of one token, averaged over the positions of a sequence."""

    matrices: int  # forward, products with weights
    attention: float  # forward, queries with keys and probabilities with values

    @property
    def forward(self) -> float:
        return self.matrices + self.attention

    @property
    def backward(self) -> float:
        """Every product has two gradients of its own size."""
        return 2 * self.forward

    @property
    def total(self) -> float:
        return self.forward + self.backward


def flops_per_token(model: ModelConfig, seq_len: int) -> TokenFlops:
    """Of training one token in a sequence of `seq_len`: head and multi-token prediction (its block and its use of the head) included,
    embedding look-up, norms and activations not."""
    params = num_params(model)
    matrices = (1 + model.mtp_depth) * params.active_head + sum(b.active_matrices for b in (*params.blocks, *params.predictions))
    return TokenFlops(matrices=2 * matrices, attention=model.num_blocks * attention_flops(model, seq_len))


def attention_flops(model: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs per token of one block's attention core. Causal: position i sees i + 1 keys, (S + 1) / 2 on average.

    Counters such as torch's FlopCounterMode, and papers that quote "12 L D S", take all S keys: about twice this.
    """
    return 2 * model.num_heads * (model.qk_head_dim + model.v_head_dim) * (seq_len + 1) / 2


def train_flops(model: ModelConfig, seq_len: int, tokens: int) -> float:
    """Of training on `tokens` tokens, forward and backward."""
    return tokens * flops_per_token(model, seq_len).total


def block_costs(model: ModelConfig, seq_len: int) -> list[float]:
    """Forward FLOPs per token of each block: what the stage balancer divides. See `head_cost` for the last stage's extra."""
    core, m = attention_flops(model, seq_len), model
    of = lambda layer: 2 * block_params(m, layer).active_matrices + core
    dense = m.num_layers if m.num_moe_layers == 0 else min(m.num_dense_layers, m.num_layers)  # blocks of a kind are alike
    return [of(0)] * dense + [of(dense)] * (m.num_layers - dense) if dense else [of(0)] * m.num_layers


def prediction_cost(model: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs per token of multi-token prediction: what the last stage has beside its blocks and the head."""
    blocks = sum(2 * b.active_matrices for b in num_params(model).predictions)
    return blocks + model.mtp_depth * (attention_flops(model, seq_len) + head_cost(model))


def embedding_cost(model: ModelConfig) -> float:
    """Forward FLOPs per token of the embedding: a look-up."""
    return 0.0


def head_cost(model: ModelConfig) -> float:
    """Forward FLOPs per token of the output head."""
    return 2.0 * model.vocab_size * model.dim


# ---------------------------------------------------------------- memory


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of training state on one rank, without activations, buffers and fragmentation."""

    weights: int
    main_grads: int
    optimizer: int
    casts: int  # under precision.linear=fp8: weights of linears in FP8, and once more transposed; made anew each step
    host: int  # in the host's memory: what is offloaded, room for what travels, the average of the weights; not in `total`

    @property
    def total(self) -> int:
        return self.weights + self.main_grads + self.optimizer + self.casts


def rank_params(model: ModelConfig, parallel: ParallelConfig, *, layers, embedding: bool, head: bool) -> tuple[int, int]:
    """(dense, expert) parameters of a rank that holds the blocks `layers` (those that predict further tokens go with the head) and,
    where said, the embedding and the head."""
    blocks = [block_params(model, layer) for layer in layers]
    table = model.vocab_size * model.dim
    # The last stage has the embedding too where the head is tied to it or more tokens are predicted, but once if it is the first.
    embeds, heads = embedding or (head and model.embeds_at_head), head and not model.tie_embeddings
    tables = embeds + heads
    dense = sum(b.dense for b in blocks) + tables * table + (model.dim if head else 0)
    return dense, sum(b.experts for b in blocks) // parallel.ep


def rank_state_bytes(config: Config, *, layers, embedding: bool, head: bool, copies: int = 1, end_copies: int = 0) -> StateBytes:
    """Weights, FP32 main gradients, and optimizer state sharded as ZeRO-1 does over each parameter's replica group.

    Weights of FP32 and FP64 are their own masters, unless those are offloaded or the engine is deepspeed. Muon has one moment, as wide as
    masters; it parts no matrix, so that what one rank has is this on average.

    `copies`: pipeline ranks that hold these same blocks; `end_copies`: that hold an embedding which both ends have, if no rank has both.
    """
    o, p, m = config.optim, config.parallel, config.model
    dense, experts = rank_params(m, p, layers=layers, embedding=embedding, head=head)
    table = m.vocab_size * m.dim * bool(end_copies and m.embeds_at_head and (embedding or head))
    share = lambda numel, ranks: -(-numel // ranks)
    sharded = lambda dense, experts: share(dense, p.dp * copies) + share(experts, p.edp * copies)
    matrices = sum(b.dense - b.router - b.norms for b in (block_params(config.model, layer) for layer in layers))
    owned = sharded(dense - table, experts) + (share(table, p.dp * end_copies) if table else 0)
    by_muon = sharded(matrices, experts) if o.algorithm == "muon" else 0
    width = ELEMENT_BYTES[config.precision.compute]
    main_width, state = max(4, width), _masters_and_moments(config, owned, by_muon)
    host = state + (main_width + width) * owned if o.offload else 0  # gradients come, weights go back
    if o.ema_decay:
        on_their_way = not o.offload and not config.cluster.device.startswith("CPU")  # masters, copied from the device
        host += main_width * owned * (1 + on_their_way)
    entries = 2 * config.model.dim**2 * sum(layer >= config.model.num_layers for layer in layers)  # of prediction modules: not in FP8
    return StateBytes(
        weights=width * (dense + experts),
        main_grads=main_width * (dense + experts),
        optimizer=0 if o.offload else state,
        casts=2 * (matrices - entries + experts) if config.precision.linear == "fp8" else 0,
        host=host,
    )


def owned_bytes(config: Config, owned: int, by_muon: int) -> int:
    """On the device: masters and moments of that many elements, some of them Muon's."""
    return 0 if config.optim.offload else _masters_and_moments(config, owned, by_muon)


def _masters_and_moments(config: Config, owned: int, by_muon: int) -> int:
    o, width = config.optim, ELEMENT_BYTES[config.precision.compute]
    main_width, moment_width = max(4, width), ELEMENT_BYTES[o.moment_precision(config.precision.compute)]
    own_masters = width < main_width or o.offload or o.engine == "deepspeed"
    return main_width * (owned * own_masters + by_muon) + 2 * moment_width * (owned - by_muon)


def checkpoint_bytes(config: Config) -> int:
    """Of all its elements: masters, moments, the average of the weights. Once each, whatever the layout: nothing is saved twice."""
    m, o, compute = config.model, config.optim, config.precision.compute
    params = num_params(m).trained
    by_muon = 0
    if o.algorithm == "muon":
        blocks = [block_params(m, layer) for layer in range(m.num_blocks)]
        by_muon = sum(b.total - b.router - b.norms for b in blocks)
    main_width, moment_width = max(4, ELEMENT_BYTES[compute]), ELEMENT_BYTES[o.moment_precision(compute)]
    return main_width * (params * (1 + bool(o.ema_decay)) + by_muon) + 2 * moment_width * (params - by_muon)


# ---------------------------------------------------------------- utilisation and money


def num_devices(config: Config) -> int:
    """Devices that a run keeps busy: one GPU per rank, or a team; on a CPU cluster, whose device is a core, one per thread."""
    return config.parallel.world_size * config.stack.team * (config.launch.threads if config.cluster.device.startswith("CPU") else 1)


def peak_flops(cluster: ClusterConfig, precision: str) -> float | None:
    """Dense peak of one device in FLOP/s, None where the cluster's file has no figure for this precision."""
    tera = cluster.peak_tflops.get(precision)
    return None if tera is None else tera * 1e12


def mfu(tokens_per_second_per_gpu: float, config: Config) -> float | None:
    """Model FLOPs utilisation, 0 to 1: useful FLOP/s of a device over its dense peak in the run's matrix products.

    Active parameters, causal attention, no recomputation. None where the peak is unknown: no figure beats a wrong one.
    """
    peak = peak_flops(config.cluster, config.precision.products)
    if peak is None:
        return None
    return tokens_per_second_per_gpu * flops_per_token(config.model, config.data.seq_len).total / peak


def dollars(seconds: float, num_devices: int, cluster: ClusterConfig) -> float:
    """US dollars of holding `num_devices` devices for `seconds`, idle or not."""
    return seconds / 3600 * num_devices * cluster.price_per_gpu_hour


def dollars_per_billion_tokens(tokens_per_second_per_gpu: float, cluster: ClusterConfig) -> float:
    """US dollars per 1e9 tokens at this speed; infinite at a speed of zero."""
    if not tokens_per_second_per_gpu > 0:
        return float("inf")
    return cluster.price_per_gpu_hour / 3600 / tokens_per_second_per_gpu * 1e9
