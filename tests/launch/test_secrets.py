"""Where secrets are found, and that none passes the console, a rank's log, or the command line. Whole commands: `tests/secrets/`."""

import os
import subprocess
import sys

import pytest
from shoestring.conf.errors import ConfigError
from shoestring.launch import cli, environment, exit_codes, rank_log, secrets
from shoestring.launch.environment import Place

KEY = "7Qa8Zb9Xc0Wd1Ve2Uf3Tg4Sh"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An environment with nothing of this machine's in it."""
    for name in list(os.environ):
        if secrets.names_one(name) or name in ("NETRC", "HF_HOME", "WANDB_CONFIG_DIR", "HF_TOKEN_PATH"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "name, text",
    [(".netrc", f"machine api.wandb.ai login user password {KEY}\n"), (".netrc", f"machine x\nlogin\nbroken password {KEY}\n"),
     (".cache/huggingface/token", f"{KEY}\n"), (".cache/huggingface/stored_tokens", f"[a]\nhf_token = {KEY}\n"),
     (".config/wandb/credentials.json", f'{{"credentials": {{"x": {{"access_token": "{KEY}", "expires_at": "2026"}}}}}}'),
     (".aws/credentials", f"[default]\naws_access_key_id = A\naws_secret_access_key = {KEY}\n"),
     (".git-credentials", f"https://me:{KEY}@example.org\n"), (".config/git/credentials", f"https://me:{KEY}@example.org\n")],
)  # fmt: skip
def test_files_of_other_programs(home, name, text):
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert secrets.known().values == {KEY: str(path)}
    path.unlink()
    assert secrets.known().values == {}


@pytest.mark.parametrize("name", ["NETRC", "HF_HOME", "HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "WANDB_CONFIG_DIR"])
def test_files_that_variables_name(home, name):
    texts = {"mine": f"machine x login y password {KEY}\n", "token": KEY, "settings": f"api_key = {KEY}\n", "aws": f"key = {KEY}\n"}
    file = {"NETRC": "mine", "HF_HOME": "token", "WANDB_CONFIG_DIR": "settings", "AWS_SHARED_CREDENTIALS_FILE": "aws"}.get(name, "token")
    (home / file).write_text(texts[file])
    path = home if name in ("HF_HOME", "WANDB_CONFIG_DIR") else home / file
    assert secrets.known(environ={"HOME": "/nowhere", name: str(path)}).values == {KEY: str(home / file)}


@pytest.mark.parametrize(
    "name, text, values",
    [("MY_TOKEN", KEY, {KEY}), ("MY_TOKEN", "short", set()), ("MAX_TOKENS", "1000000000", set()), ("SSH_KEY", "/etc/passwd", set()),
     ("AWS_SECRET_ACCESS_KEY", f"/{KEY}", {f"/{KEY}"}), ("https_proxy", f"http://me:{KEY}@proxy:1", {KEY}), ("MY_NAME", KEY, set()),
     ("ALERT_WEBHOOK", f"https://example.org/services/{KEY}", {f"https://example.org/services/{KEY}", f"/services/{KEY}"})],
)  # fmt: skip
def test_variables(home, name, text, values):
    assert set(secrets.known(environ={"HOME": str(home), name: text}).values) == values


def test_the_variable_that_the_configuration_names(home):
    """Of any name. Libraries show an address's path without the rest."""
    hidden = secrets.known(f"http://127.0.0.1:1/services/{KEY}").hide(f"POST /services/{KEY} HTTP/1.1")
    assert hidden == "POST (hidden) HTTP/1.1"


def test_nothing_of_an_unhandled_error_is_shown(home):
    """By Python itself, on the console of a process of ours, from threads too."""
    code = (
        "import os, sys, threading; from shoestring.launch import secrets; secrets.install()\n"
        "def fail(): key = os.environ['MY_TOKEN']; raise ValueError(f'no: {key}')\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "sys.stdout.writelines([os.environ['MY_TOKEN']]); print('', os.environ['MY_TOKEN'], flush=True)\n"
        "if not os.fork(): fail()\n"
        "os.wait(); fail()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"MY_TOKEN": KEY}, capture_output=True, text=True)
    assert done.returncode == 1 and KEY not in done.stdout + done.stderr
    assert done.stderr.count("ValueError: no: (hidden)") == 3 and done.stdout.count("(hidden)") == 2


def test_a_rank_of_torchrun_tells_no_secret(home, monkeypatch, capfd):
    """In its file and, of its error, on the console: from a process of its own, whose streams become a file."""
    monkeypatch.setenv("MY_TOKEN", KEY)
    if not (child := os.fork()):
        try:
            secrets.install()
            with rank_log.heard(home, Place(rank=1, local_rank=1, world_size=2, local_world_size=2)):
                print(f"told {KEY}", flush=True)
                raise ValueError(f"no: {KEY}")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    (log,) = home.glob("logs/*/rank_1.log")
    assert "told (hidden)" in log.read_text() and KEY not in log.read_text()
    out, err = capfd.readouterr()
    assert "ValueError: no: (hidden)" in err and KEY not in out + err


def test_streams_stay_what_they_were(home, capfd):
    """Twice installed is once; a file takes their place, and lines reach it at once."""
    before = sys.stdout
    try:
        secrets.install()
        secrets.install(KEY)
        assert sys.stdout.stream is before and sys.stdout.fileno() == before.fileno() and sys.stdout.encoding == before.encoding
        print(f"a {KEY}")
        assert secrets.hide(KEY) == "(hidden)"
    finally:
        sys.stdout, sys.stderr = sys.stdout.stream, sys.stderr.stream
    assert capfd.readouterr().out == "a (hidden)\n" and secrets.hide(KEY) == KEY


@pytest.mark.parametrize("words", [["train", f"name=x{KEY}"], ["plan", KEY], ["launch", "launch=k8s", f"run_dir=/x/{KEY}/y", "--dry-run"],
                                   ["report", f"runs/{KEY}"]])  # fmt: skip
def test_words_that_everyone_sees_hold_none(home, monkeypatch, capsys, words):
    monkeypatch.setenv("MY_TOKEN", KEY)
    assert cli.main(words) == exit_codes.CONFIG
    out, err = capsys.readouterr()
    assert err.startswith("error: command line") and "what MY_TOKEN holds" in err and err.count("\n") == 1 and KEY not in out + err


def test_files_of_settings_hold_none(home, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", KEY)
    (home / "experiment").mkdir()
    (home / "experiment/x.yaml").write_text(f"# {KEY}\n")
    with pytest.raises(ConfigError, match=r"x.yaml = \(hidden\): is or has what MY_TOKEN holds") as refusal:
        secrets.refuse(["train"], home)
    assert KEY not in str(refusal.value)
    (home / "experiment/x.yaml").write_text("# nothing\n")
    secrets.refuse(["train", "name=y"], home)


def test_wandb_sends_no_reports_of_crashes(monkeypatch):
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    environment.prepare(threads=1)
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
