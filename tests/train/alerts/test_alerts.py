"""Alerts go out once for each episode, to every place, whatever becomes of one of them."""

import json
import os
import stat
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch.local import fork_ranks
from shoestring.tests.train.sinks.made import record
from shoestring.train import trainer
from shoestring.train.alerts import channels
from shoestring.train.alerts.alert import Alert, begun, keep
from shoestring.train.alerts.channels import Channel, Command, Journal, Said, ToWandb, Webhook
from shoestring.train.sinks.alerting import AlertSink
from shoestring.train.step import Watch

WORDS = [
    "model=micro", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=64", "train.steps=8", "optim.warmup_steps=2",
    "checkpoint.interval=0",
]  # fmt: skip
ALERT = Alert(run="one", kind="stall", firing=True, text="no step for 5:00", time_unix=1e9, step=7, dollars=1.5)


class Kept(Channel):
    def __init__(self):
        self.alerts = []

    def _send(self, alert):
        self.alerts.append(alert)


def wait_for(found, seconds: float = 20.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found():
            return
        time.sleep(0.01)
    raise AssertionError("it has not come")


# ---------------------------------------------------------------- episodes


def test_a_stall_is_told_while_it_lasts(tmp_path):
    """By a clock that the test moves; longer than usual steps wait longer."""
    clock, kept = [0.0], Kept()
    sink = AlertSink(load([*WORDS, "launch.alerts.stall_s=60"]), tmp_path, [kept], clock=lambda: clock[0])

    def look(expected: int):
        """Wakes the thread, which sleeps by the real clock, and waits until it has looked."""
        sink.trouble(f"wakes it {clock[0]}", "up")
        wait_for(lambda: kept.alerts and kept.alerts[-1].text == "up")
        kept.alerts.pop()
        if expected:
            wait_for(lambda: kept.alerts)
        else:
            time.sleep(0.3)
        assert len(kept.alerts) == expected
        return kept.alerts.pop() if expected else None

    try:
        clock[0] = 59.0
        sink.write(record(1))
        clock[0] = 118.0
        sink.write(record(2))
        clock[0] += 120
        look(0)  # five steps of a minute are waited for
        sink.write(record(3))
        clock[0] += 601
        stall = look(1)
        assert stall.text == "no step for 10:01, since step 3" and stall.step == 3 and stall.firing
        sink.write(record(4))
        wait_for(lambda: kept.alerts)
        assert not kept.alerts[0].firing and kept.alerts[0].text == "step 4 has come, after 10:01"
    finally:
        sink.close()


def test_a_stall_of_the_real_clock(tmp_path):
    kept = Kept()
    sink = AlertSink(load([*WORDS, "launch.alerts.stall_s=0.3"]), tmp_path, [kept])
    wait_for(lambda: kept.alerts)
    sink.close()
    assert [a.kind for a in kept.alerts] == ["stall"] and "since the session began" in kept.alerts[0].text


def test_a_run_that_goes_on_does_not_tell_again(tmp_path):
    config = load([*WORDS, "budget_usd=10", "launch.alerts.disk_checkpoints=0"])

    def session(*records):
        kept = Kept()
        sink = AlertSink(config, tmp_path, [kept, Journal(tmp_path)])
        for each in records:
            sink.write(each)
        sink.close()
        return [(alert.kind, alert.firing) for alert in kept.alerts]

    assert session(record(1, dollars=1), record(2, dollars=6)) == [("budget_usd 50%", True)]
    with open(tmp_path / "alerts.jsonl", "a") as file:
        file.write('{"kind": "budget_u')  # a kill
    assert session(record(3, dollars=7)) == []
    assert session(record(4, dollars=8.2)) == [("budget_usd 80%", True)]
    assert set(begun(tmp_path)) == {"budget_usd 50%", "budget_usd 80%"}


def test_lines_that_are_none(tmp_path):
    for line in ("", "{}", "[1]", "null", '{"kind": 3}', '{"kind": "stall", "firing": true}'):
        (tmp_path / "alerts.jsonl").write_bytes(line.encode() + b"\n\xff\xfe\n")
        assert begun(tmp_path) == {}
    keep(tmp_path, ALERT)
    assert begun(tmp_path) == {"stall": ALERT}


# ---------------------------------------------------------------- places


@contextmanager
def receiving(*answers: int):
    """A server that keeps what is posted; of its answers the last is given ever after."""
    posted, left = [], list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(left.pop(0) if len(left) > 1 else left[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook?token=canary", posted
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_webhook_gets_json(capfd):
    with receiving(503, 200) as (address, posted):
        Webhook("HOOK", address, tries_s=(0, 0)).send(ALERT)
    (headers, _), (_, body) = posted
    assert headers["Content-Type"] == "application/json"
    found = json.loads(body)
    assert found["text"] == "one: stall. no step for 5:00" and found["kind"] == "stall" and found["dollars"] == 1.5 and found["firing"]
    assert capfd.readouterr().err == ""


def test_a_webhook_that_does_not_work_is_said_once_without_its_address(capfd):
    with receiving(500) as (address, posted):
        hook = Webhook("HOOK", address, tries_s=(0, 0))
        hook.send(ALERT)
        hook.send(ALERT)
    assert len(posted) == 4
    hook.send(ALERT)  # nobody listens there now
    assert capfd.readouterr().err == "alerts do not reach the webhook of HOOK: it answers 500\n"
    other = Webhook("HOOK", address, tries_s=(0,))
    other.send(ALERT)
    assert capfd.readouterr().err == "alerts do not reach the webhook of HOOK: ConnectionRefusedError\n"


@pytest.mark.parametrize("address", ["", "file:///etc/passwd", "ftp://x/canary", "gopher"])
def test_an_address_that_is_none(capfd, address):
    Webhook("HOOK", address).send(ALERT)
    said = capfd.readouterr().err
    assert said.startswith("launch.alerts.webhook: HOOK ") and said.count("\n") == 1 and (not address or address not in said)


def test_a_command_gets_json_on_its_input(tmp_path):
    program = [sys.executable, "-c", "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())", str(tmp_path / "a b; $(c)")]
    command = Command(program)
    command.send(ALERT)
    command.send(ALERT)
    first, second = (tmp_path / "a b; $(c)").read_text().splitlines()
    assert first == second and json.loads(first)["text"] == ALERT.text


@pytest.mark.parametrize(
    ("words", "why"),
    [(["false"], "exit status 1"), (["no-such-program"], "FileNotFoundError"),
     ([sys.executable, "-c", "import time; time.sleep(60)"], "it did not end within 0.5 s"),
     ([sys.executable, "-c", "import sys; sys.exit('the cause')"], "the cause")],
    ids=["fails", "is not there", "hangs", "says why"],
)  # fmt: skip
def test_a_command_that_fails_is_said_once(words, why, capfd):
    command = Command(words, limit_s=0.5 if "time" in words[-1] else 20)
    command.send(ALERT)
    command.send(ALERT)
    said = capfd.readouterr().err
    assert why in said and said.count("\n") == 1


def test_a_command_that_hangs_leaves_nothing_behind(tmp_path, capfd):
    """What it has started ends with it."""
    words = ["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; wait"]
    sent = threading.Thread(target=Command(words, limit_s=1.0).send, args=(ALERT,), daemon=True)
    sent.start()
    sent.join(30)
    assert not sent.is_alive() and "did not end within 1 s" in capfd.readouterr().err
    child = f"/proc/{int((tmp_path / 'child').read_text())}/stat"
    wait_for(lambda: not os.path.exists(child) or ") Z " in open(child).read())  # noqa: SIM115


def test_one_channel_that_fails_does_not_keep_it_from_others(tmp_path, capfd):
    said, mails, kept = [], [], Kept()

    def fail(*_):
        raise OSError(28, "No space left on device")

    sink = AlertSink(load(WORDS), tmp_path, [Said(fail), ToWandb(lambda *mail: mails.append(mail)), Said(said.append), kept])
    sink.trouble("loss", "step 3: loss nan")
    sink.write(record(4))
    sink.close()
    assert said == ["alert: step 3: loss nan", "alert over: step 4: loss is as it should be"]
    assert mails == [("unnamed: loss" if load(WORDS).name == "unnamed" else f"{load(WORDS).name}: loss", "step 3: loss nan")]
    assert [a.firing for a in kept.alerts] == [True, False] and capfd.readouterr().err.count("alerts do not reach") == 1


def test_an_address_in_a_configuration_is_refused_unseen():
    with pytest.raises(ConfigError) as caught:
        load([*WORDS, "launch.alerts.webhook='https://hooks.example/secret'"])
    assert "secret'" not in str(caught.value) and "hooks.example" not in str(caught.value) and "env:" in str(caught.value)


# ---------------------------------------------------------------- in training


class Spikes(Watch):
    """At step 6, and at no other, the loss that is found is not finite, in the first tries."""

    tries = 2

    def begun(self, engine):
        compute = engine.executor.step
        self.engine = engine

        def step(*args, **options):
            losses = compute(*args, **options)
            if engine.optimizer.steps == 5 and self.left:
                self.left -= 1
                next(grad for grad in engine.optimizer.main_grad.values() if grad.any()).view(-1)[0] = float("nan")
            return losses

        self.left, self.tries = self.tries, 0  # not again after going back
        engine.executor.step = step


def job(words, watch, webhook=""):
    trainer.run(load(words), torch.device("cpu"), log=lambda line: None, watch=watch, webhook=webhook)


@pytest.mark.parametrize("ep", [1, 2])
def test_a_step_that_is_not_taken_is_told(tmp_path, ep):
    """By the run's own guard: no record tells of it. To a webhook, a command and the run directory; and its end with the next step."""
    script = tmp_path / "hear.sh"
    script.write_text(f'#!/bin/sh\ncat >> "{tmp_path}/heard"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    with receiving(200) as (address, posted):
        words = [*WORDS, f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", f"parallel.ep={ep}",
                 "launch.alerts.webhook=env:HOOK", f"launch.alerts.command=['{script}']"]  # fmt: skip
        fork_ranks(ep, job, words, Spikes(), address)
    kept = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert [(a["kind"], a["firing"]) for a in kept] == [("loss", True), ("loss", False)]
    assert kept[0]["text"].startswith("step 6: ") and kept[0]["step"] == 5 and kept[1]["text"] == "step 6: loss is as it should be"
    assert [json.loads(body)["kind"] for _, body in posted] == ["loss", "loss"]
    assert [json.loads(line) for line in (tmp_path / "heard").read_text().splitlines()] == kept
    assert "canary" not in "".join(p.read_text(errors="replace") for p in (tmp_path / "run").rglob("*") if p.is_file())


def test_going_back_is_told(tmp_path):
    """Two steps in a row that cannot be trained on, then back to the checkpoint of step 4: told, and over with the step after."""
    spikes = Spikes()
    spikes.tries = 6  # each twice, and a third time to find whose it is
    words = [*WORDS, f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", "guard.patience=2", "checkpoint.interval=4"]
    fork_ranks(1, job, words, spikes)
    kept = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert [(a["kind"], a["firing"]) for a in kept] == [("loss", True), ("rollback", True), ("rollback", False), ("loss", False)]
    assert "the run goes back to its last checkpoint" in kept[1]["text"] and kept[2]["text"] == "the run goes on: step 5"


class Fails(Watch):
    def begun(self, engine):
        def step(*args, **options):
            raise RuntimeError("the cable is out\nand more")

        engine.executor.step = step


def test_a_run_that_fails_tells_at_the_end(tmp_path):
    words = [*WORDS, f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(Exception, match="the cable is out"):
        fork_ranks(1, job, words, Fails())
    told = begun(tmp_path / "run")
    assert set(told) == {"failure"} and told["failure"].text == "after step 0: RuntimeError: the cable is out"
    fork_ranks(1, job, words, Watch())
    assert begun(tmp_path / "run") == {}


def test_tries_end_within_the_run_s_patience():
    """What a run waits for at its end is bounded: see `CLOSE_S`."""
    assert sum(channels.TRIES_S) < 10
