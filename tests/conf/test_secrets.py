"""What is hidden and refused as a secret by its value or its shape, and that ordinary text stays as it is."""

import json
from pathlib import Path

import pytest
import shoestring
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load, load_saved, to_yaml
from shoestring.conf.errors import HIDDEN, ConfigError, UnknownKey
from shoestring.conf.secrets import SHAPED, SHORTEST, Secrets, names_one

KEY = "7Qa8Zb9Xc0Wd1Ve2Uf3Tg4Sh5Ri6Qj7Pk8Ol9Nm"
HEX = "0123456789abcdef" * 2 + "01234567"

# Each with KEY or HEX in it, from a program's documentation or its messages.
SHAPES = [
    f"fatal: unable to access 'https://me:{KEY}@example.org/x.git/'", f"s3://user:{KEY}@bucket/path", f"https://{KEY}@example.org/x",
    f"GET https://example.org/x?a=1&X-Amz-Signature={KEY}&b=2", f"https://example.org/?access_token={KEY}", f"x?a=1&amp;api_key={KEY}",
    f"https://hooks.slack.com/services/T000/B000/{KEY}", f"https://discord.com/api/webhooks/1/{KEY}",
    f"Authorization: Bearer {KEY}", f"{{'authorization': 'Basic {KEY}'}}", f"curl -H Authorization:{KEY}", f"bearer token: Bearer {KEY}",
    f"hf_{KEY[:34]}", f"ghp_{KEY[:36]}", f"github_pat_{KEY}", f"glpat-{KEY[:20]}", f"xoxb-{KEY}", f"sk-proj-{KEY}", f"sk-ant-api03-{KEY}",
    f"wandb login {HEX}", f"wandb login --relogin {HEX}", f"export WANDB_API_KEY={HEX}", f"WANDB_API_KEY='{KEY * 2}'",
    f"--export=ALL,MY_TOKEN={KEY}", f"DB_PASSWORD={KEY}", f"TOKEN={KEY}", f"MY_KEYS={KEY}", "password=0123456789abcdef01234567",
    f'{{"api_key": "{KEY}"}}', f"aws_secret_access_key = {KEY}",
    f"password={KEY}", f"push --token {KEY} file", f"push --api-key={KEY}", f"-----BEGIN RSA PRIVATE KEY-----\n{KEY}\n-----END",
]  # fmt: skip

# What it must leave alone: each is of a kind that configurations, manifests, logs and pages of this project hold.
PLAIN = [
    "sha256:" + HEX + HEX[:24], f"commit {HEX}", f"wandb 0.31 at {HEX}", "run 7a318ab5b177", "s3://bucket/key@v2", "file:///a/b@c",
    "http://127.0.0.1:8050/?run=a", "ssh://git@example.org/x.git", "git@example.org:x/y.git", "docker://image@sha256:" + HEX,
    "model.num_tokens=1000000000", "MAX_TOKENS=10000000000", "train.tokens = 614400000: must be", "max_tokens=614400000",
    "NCCL_IB_PKEY=0x8001aaaa", "eos_token=<|end_of_text|>", "hf_checkpoint_conversion_of_something_long", "disk-0123456789ABCDEFghijklmn",
    "sk-learn-pipelines-of-something-long", "XOXB", "AKIA", "tokens/s/GPU", "a password: must be given in the environment",
    "the bearer of this", "GOOGLE_APPLICATION_CREDENTIALS=/etc/key.json", "export SSH_KEY=~/.ssh/id", "MY_TOKEN=$MY_TOKEN",
    "password=short", "env:ALERT_WEBHOOK", "-----BEGIN CERTIFICATE-----\nMIIB\n-----END", "a.key===b.key&&c.key===d.keyofsomething",
]  # fmt: skip


@pytest.mark.parametrize("text", SHAPES)
def test_a_secret_is_known_by_its_shape(text):
    hidden = SHAPED.hide(text)
    assert SHAPED.found(text) and HIDDEN in hidden and not any(secret[i : i + 12] in hidden for secret in (KEY, HEX) for i in (0, 20))
    assert SHAPED.hide(hidden) == hidden


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_stays(text):
    assert SHAPED.hide(text) == text and not SHAPED.found(text)


def test_nothing_in_this_repository_is_taken_for_a_secret():
    """Code, pages, results, configurations. (Tests of secrets are left out.)"""
    root = Path(shoestring.__file__).parent
    names = [p for p in root.rglob("*") if p.suffix in (".py", ".md", ".yaml", ".json", ".toml", ".txt", ".js", ".css", ".svg")]
    kept = [p for p in names if "secrets" not in str(p) and not any(part.startswith(".") for part in p.relative_to(root).parts)]
    changed = [str(p) for p in kept if SHAPED.hide(text := p.read_text(encoding="utf-8", errors="replace")) != text]
    assert len(kept) > 400 and not changed


@given(value=st.text(min_size=SHORTEST).filter(str.strip), before=st.text(), after=st.text())
def test_a_known_value_is_hidden_wherever_it_stands(value, before, after):
    secrets = Secrets(values={value: "NAME"})
    hidden = secrets.hide(f"{before} {value} {after}")
    assert (value not in hidden or value in HIDDEN) and secrets.found(value) == "what NAME holds"
    assert value not in json.loads(secrets.hide(json.dumps(f" {value} ")).encode().decode()) or value in HIDDEN


def test_a_short_value_is_not_hidden():
    """It would take words out of every text: `test` is a password, too."""
    assert Secrets(values={"a" * (SHORTEST - 1): "X"}).hide("aaaaaaa and more") == "aaaaaaa and more"


def test_of_two_values_the_longer_is_hidden_whole():
    assert Secrets(values={"abcdefgh": "A", "abcdefghijkl": "B"}).hide("abcdefghijkl abcdefgh") == f"{HIDDEN} {HIDDEN}"


@pytest.mark.parametrize(
    "name, secret",
    [("WANDB_API_KEY", True), ("HF_TOKEN", True), ("AWS_ACCESS_KEY_ID", True), ("aws_session_token", True), ("PGPASSWORD", True),
     ("MYSQL_PWD", True), ("ALERT_WEBHOOK", True), ("ALERT_WEBHOOK_URL", True), ("SLURM_JWT", True), ("MY_SECRETS", True),
     ("NCCL_IB_PKEY", False), ("PWD", False), ("OLDPWD", False), ("TOKENIZERS_PARALLELISM", False), ("SSH_AUTH_SOCK", False),
     ("KEYBOARD", False), ("NCCL_DEBUG", False)],
)  # fmt: skip
def test_names_of_variables(name, secret):
    assert names_one(name) == secret


@pytest.mark.parametrize(
    "word, field",
    [(f"data.sources.x.paths=['https://me:{KEY}@example.org/x']", "data.sources.x.paths[0]"),
     (f"launch.slurm.setup=['export MY_API_KEY={KEY}']", "launch.slurm.setup[0]"),
     (f"launch.alerts.command=[notify,--token,{KEY}]", "launch.alerts.command"),
     (f"launch.endpoint=http://me:{KEY}@node0", "launch.endpoint"), (f"name=hf_{KEY[:34]}", "name"),
     (f"cluster.env={{HTTPS_PROXY: 'http://me:{KEY}@proxy'}}", "cluster.env.HTTPS_PROXY")],
)  # fmt: skip
def test_settings_that_hold_one_are_refused_unseen(word, field):
    with pytest.raises(ConfigError) as refusal:
        load([word])
    message = str(refusal.value)
    assert message.startswith(f"{field} = {HIDDEN}: is or has ") and "environment variable or ~/.netrc" in message
    assert KEY[:12] not in message and "\n" not in message


def test_an_unknown_key_that_names_one_does_not_show_its_value(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/x.yaml").write_text("# @package _global_\nlaunch: {wandb_key: abcdefgh}\n")
    for words, more in (["launch.wandb_key=abcdefgh"], ()), (["experiment=x"], (tmp_path,)):
        with pytest.raises(UnknownKey, match=r"launch\.wandb_key = \(hidden\): no such key") as refusal:
            load(words, *more)
        assert "abcdefgh" not in str(refusal.value)
    with pytest.raises(UnknownKey, match=r"optim\.lrr = 3: no such key"):
        load(["optim.lrr=3"])


def test_what_a_run_has_kept_is_still_read(tmp_path):
    """Its pages can be made; they hide what is in it."""
    text = to_yaml(load([])).replace("endpoint: ''", f"endpoint: http://me:{KEY}@node0")
    (tmp_path / "config.yaml").write_text(text)
    assert KEY in load_saved(tmp_path / "config.yaml").launch.endpoint


