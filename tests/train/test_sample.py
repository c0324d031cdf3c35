"""Text from models: choices against brute force, greedy text against a naive loop, and what may be loaded from where."""

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.schema import ConfigError, ModelConfig
from shoestring.parallel.optimizer.zero import Chunk
from shoestring.train.checkpoint.checkpointer import Checkpointer
from shoestring.train.data.tokenizer import END_OF_DOCUMENT, ByteTokenizer, Tokenizer, train_bpe
from shoestring.train.interop import hf
from shoestring.train.model.decoder import CausalLM, materialise
from shoestring.train.sample import Generator, Loaded, Sampling, TextStream, choose, load
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

GREEDY = Sampling(temperature=0.0)


def small(**changes) -> ModelConfig:
    fields = dict(
        name="m", num_layers=2, dim=16, vocab_size=300, max_seq_len=64, num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, num_dense_layers=1, dense_hidden_dim=24, num_experts=4, top_k=2, expert_hidden_dim=8,
        init_std=0.3,
    )  # fmt: skip
    return ModelConfig(**(fields | changes)).freeze()


def build(m: ModelConfig) -> CausalLM:
    with torch.device("meta"):
        model = CausalLM(m)
    materialise(model.stage, seed=0)
    return model


def loaded(model: CausalLM | None = None) -> Loaded:
    return Loaded(model=model or build(small()), tokenizer=ByteTokenizer(), begin_id=256, source=None)


# ---------------------------------------------------------------- choosing


def nucleus(probs: list[float], top_p: float) -> tuple[int, ...]:
    """Of all sets of tokens that have enough probability, one of the smallest, and of those the likeliest."""
    sets = [s for n in range(1, len(probs) + 1) for s in itertools.combinations(range(len(probs)), n)]
    enough = [s for s in sets if sum(probs[i] for i in s) >= top_p - 1e-12]
    return min(enough, key=lambda s: (len(s), -sum(probs[i] for i in s)))


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [(1.0, 1.0), (0.7, 0.8), (1.5, 0.9), (1.0, 0.35), (1.0, 0.01)],  # the last two: the likeliest alone
)
def test_draws_have_the_nucleus_distribution(temperature, top_p):
    """10,000 draws of six tokens, each count within five deviations; none from outside."""
    logits = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.9, -4.0])
    weights = [2.718281828459045 ** (x / temperature) for x in logits.tolist()]
    probs = [w / sum(weights) for w in weights]
    kept = nucleus(probs, top_p)
    random, sampling = torch.Generator().manual_seed(0), Sampling(temperature=temperature, top_p=top_p)
    draws = torch.tensor([choose(logits, sampling, random) for _ in range(10_000)]).bincount(minlength=6).tolist()
    for i, count in enumerate(draws):
        p = probs[i] / sum(probs[j] for j in kept) if i in kept else 0.0
        assert abs(count - 10_000 * p) <= 5 * (10_000 * p * (1 - p)) ** 0.5


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=7, unique=True), st.floats(0.05, 1.0), st.floats(0.2, 3.0))
@settings(max_examples=60, deadline=None)
def test_draws_stay_in_the_nucleus(logits, top_p, temperature):
    probs = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0).tolist()
    random, sampling = torch.Generator().manual_seed(0), Sampling(temperature=temperature, top_p=top_p)
    logits = torch.tensor(logits, dtype=torch.float64)
    drawn = {choose(logits, sampling, random) for _ in range(50)}
    size = len(nucleus(probs, top_p))
    ranks = {sorted(probs, reverse=True).index(probs[i]) for i in drawn}
    assert max(ranks) <= size  # one more, where rounding decides whether top_p is reached
    assert choose(logits, GREEDY, random) == int(logits.argmax())


def test_extremes_of_temperature():
    logits, random = torch.tensor([1.0, 3.0, 2.0]), torch.Generator().manual_seed(0)
    assert {choose(logits, Sampling(temperature=1e-9), random) for _ in range(20)} == {1}
    assert {choose(logits, Sampling(temperature=1e9, top_p=1.0), random) for _ in range(100)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "--temperature = -1.0"),
        ({"temperature": float("nan")}, "--temperature = nan"),
        ({"top_p": 0.0}, "--top-p = 0.0"),
    ],
)
def test_impossible_sampling_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)


# ---------------------------------------------------------------- generating


def test_greedy_text_equals_a_naive_loop():
    """Every token from the whole sequence run anew; ids that no text has are left out, though most often they are the likeliest."""
    ids, model = [256, *b"some text"], build(small(vocab_size=2000))
    assert model(torch.tensor([ids]))[0, -1].argmax() > 256
    for _ in range(25):
        ids.append(int(model(torch.tensor([ids]))[0, -1, :257].argmax()))
    generator = Generator(loaded(model), "some text", 25)
    wanted = list(itertools.takewhile(lambda i: i != 256, ids[10:]))
    assert len(wanted) > 3
    assert list(generator.tokens(GREEDY)) == wanted
    assert list(generator.tokens(GREEDY)) == wanted  # again, from the prompt that was read before


def test_a_seed_is_a_text():
    generator = Generator(loaded(), "", 20)
    text = lambda seed: list(generator.tokens(Sampling(temperature=1.0, top_p=1.0, seed=seed)))
    first = [text(seed) for seed in range(4)]
    assert [text(seed) for seed in range(4)] == first and len({str(t) for t in first}) == 4
    assert list(Generator(loaded(), "", 10).tokens(Sampling(temperature=1.0, top_p=1.0, seed=3))) == first[3][:10]


def test_text_ends_with_the_document():
    """A head that wants nothing but the end: after two tokens it is the likeliest, and it is not given out."""
    model = build(small(tie_embeddings=True))
    generator = Generator(loaded(model), "x", 20)
    calls, decoder = [], generator._decoder
    ends = torch.full((1, 300), 0.0)
    ends[0, 256] = 9.0

    class Ending:
        def __call__(self, tokens):
            calls.append(tokens.tolist())
            logits = decoder(tokens)
            return ends if len(calls) == 2 else logits

        rewind = decoder.rewind

    generator._decoder = Ending()
    tokens = list(generator.tokens(GREEDY))
    assert len(tokens) == 2 and calls == [[t] for t in tokens]


def test_length_is_bounded_by_the_model():
    generator = Generator(loaded(), "x" * 60, 100)  # with the begin, 61 of 64
    assert generator.max_tokens == 3 and len(list(generator.tokens(Sampling(temperature=1.0)))) <= 3
    with pytest.raises(ConfigError, match=r"prompt = 64 tokens: must be fewer than model.max_seq_len = 64"):
        Generator(loaded(), "x" * 63, 100)


# ---------------------------------------------------------------- text as it comes


def pieces(ids, tokenizer):
    stream = TextStream(tokenizer)
    return [*(stream.add(i) for i in ids), stream.finish()]


@given(st.lists(st.integers(0, 256), max_size=30))
def test_pieces_are_the_text_whatever_the_bytes(ids):
    tokenizer = ByteTokenizer()
    assert "".join(pieces(ids, tokenizer)) == tokenizer.decode(ids)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["der Bär sagt: größer ☕☕\t" * 20, "naïve café 中文 " * 10], 300)


@given(st.lists(st.integers(0, 299), max_size=12))
def test_pieces_are_the_text_of_a_bpe(bpe, ids):
    ids = [i % bpe.vocab_size for i in ids]
    assert "".join(pieces(ids, bpe)) == bpe.decode(ids)


def test_characters_come_whole():
    assert pieces("aé☕b".encode(), ByteTokenizer()) == ["a", "", "é", "", "", "☕", "b", ""]
    assert pieces("a☕".encode()[:-1], ByteTokenizer()) == ["a", "", "", "\ufffd"]  # the end of a text that broke off


def test_blanks_of_other_tokenizers_are_kept():
    """One whose decoder takes the blank of the first word away."""
    backend = Backend(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([END_OF_DOCUMENT])
    assert pieces([0, 1, 0], Tokenizer(backend)) == ["a", " b", " a", ""]


# ---------------------------------------------------------------- loading


def write_run(folder, m: ModelConfig, steps=(1,), average: bool = False) -> CausalLM:
    """A run directory whose checkpoint of step i holds the model's weights times i, and as their average the weights times -i."""
    model = build(m)
    for step in steps:
        chunks = {f"{n}.master": Chunk(p.numel(), 0, p.detach().flatten() * step) for n, p in model.stage.named_parameters()}
        chunks |= {n: Chunk(b.numel(), 0, b.flatten() + step) for n, b in model.stage.named_buffers()}
        if average:
            chunks |= {f"{n}.ema": Chunk(p.numel(), 0, p.detach().flatten() * -step) for n, p in model.stage.named_parameters()}
        extra = {"progress": {"step": step}, "model": dataclasses.asdict(m), "precision": "bf16"}
        Checkpointer(folder / "checkpoints", keep_last=9, async_save=False).save(step, chunks, extra)
    ByteTokenizer().save(folder / "tokenizer.json")
    return model


def test_a_run_is_loaded_in_fp32_from_its_newest_checkpoint(tmp_path):
    model = write_run(tmp_path, small(), steps=(1, 2))
    found = load(tmp_path)
    assert found.source.name == "step_00000002" and found.begin_id == found.tokenizer.eod_id == 256
    tensors = {**dict(found.model.stage.named_parameters()), **dict(found.model.stage.named_buffers())}
    assert len(tensors) > 10 and all(t.dtype == torch.float32 for t in tensors.values())
    for name, weight in model.stage.named_parameters():
        assert torch.equal(tensors[name], 2 * weight), name
    assert torch.equal(tensors["layers.1.router.bias"], torch.full((4,), 2.0))
    earlier = load(tmp_path / "checkpoints" / "step_00000001")
    assert torch.equal(dict(earlier.model.stage.named_parameters())["embed"], model.stage.embed)


def test_the_average_of_a_run_is_loaded(tmp_path):
    """With the selection biases, of which there is no average; prediction modules are left out of it as well."""
    model = write_run(tmp_path / "run", small(mtp_depth=1), average=True)
    found = load(tmp_path / "run", weights="ema").model.stage
    tensors = dict(found.named_parameters())
    assert tensors.keys() < dict(model.stage.named_parameters()).keys()
    assert all(torch.equal(tensor, -model.stage.get_parameter(name)) for name, tensor in tensors.items())
    assert torch.equal(found.layers["1"].router.bias, torch.ones(4))
    assert torch.equal(load(tmp_path / "run").model.stage.embed, model.stage.embed)


def test_an_average_that_is_not_there(tmp_path):
    write_run(tmp_path / "run", small())
    with pytest.raises(hf.HFError, match=r"holds no ema weights: was optim.ema_decay 0\?"):
        load(tmp_path / "run", weights="ema")
    hf.export(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    with pytest.raises(ConfigError, match=r"--weights = ema: is of a run; .*hf is a Hugging Face folder"):
        load(tmp_path / "hf", weights="ema")


def test_prediction_modules_are_left_out(tmp_path):
    model = write_run(tmp_path, small(mtp_depth=1))
    found = load(tmp_path).model
    tokens = torch.arange(20)[None]
    assert sum(p.numel() for p in found.parameters()) < sum(p.numel() for p in model.parameters())
    model.stage.layers["1"].router.bias += 1  # as it was saved; the same for all experts
    assert torch.equal(found(tokens), model(tokens))


@pytest.mark.parametrize("begin", [None, "<begin>"])
def test_an_export_writes_the_same_text(tmp_path, begin):
    """And where its tokenizer has a token for the begin of a text, a text begins with it."""
    write_run(tmp_path / "run", small())
    hf.export(tmp_path / "run", tmp_path / "hf", dtype="fp32")
    if begin:
        backend = Backend.from_file(str(tmp_path / "hf" / "tokenizer.json"))
        backend.add_special_tokens([begin])
        backend.save(str(tmp_path / "hf" / "tokenizer.json"))
        described = tmp_path / "hf" / "tokenizer_config.json"
        described.write_text(json.dumps(json.loads(described.read_text()) | {"bos_token": {"content": begin}}))
    run, exported = load(tmp_path / "run"), load(tmp_path / "hf")
    assert exported.begin_id == (257 if begin else 256) and exported.tokenizer.eod_id == 256
    if not begin:
        assert list(Generator(run, "ab", 9).tokens(GREEDY)) == list(Generator(exported, "ab", 9).tokens(GREEDY))


def test_what_cannot_be_loaded_is_told(tmp_path):
    with pytest.raises(hf.HFError, match="nothing: holds no complete checkpoint"):
        load(tmp_path / "nothing")
    write_run(tmp_path / "run", small(vocab_size=250))
    with pytest.raises(ConfigError, match=r"its 257 ids do not fit the model's 250"):
        load(tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"no readable tokenizer.json at .*run/tokenizer.json"):
        load(tmp_path / "run")
