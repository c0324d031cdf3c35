"""Whose a checkpoint is: ours is taken, somebody else's only by a word of trust in its very bytes, or a signature."""

import grp
import json
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch import checkpoint as command
from shoestring.launch import cli, exit_codes
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.tests.train.test_sample import small, write_run
from shoestring.train import resume, sample, trainer
from shoestring.train.checkpoint import folder as folders
from shoestring.train.checkpoint import signature, trust
from shoestring.train.checkpoint.manifest import MANIFEST, CheckpointError, DamagedError
from shoestring.train.checkpoint.trust import Trust, of_checkpoint, of_folder
from shoestring.train.interop import hf

OTHER = 4242  # a user who is not here
ROOT = os.geteuid() == 0
BASE = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=2", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "train.global_batch_tokens=64", "train.micro_batch_sequences=1", "train.steps=3",
    "train.eval_sequences=4", "optim.warmup_steps=2", "checkpoint.interval=2", "data.sources.synthetic.num_documents=300",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "run"
    write_run(folder, small())
    return folder


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def give(monkeypatch):
    """give(path, uid): a path and all below it belong to somebody. As root they do; else this code's one look at them is told so."""
    owners: dict[Path, int] = {}
    look = trust.status

    def status(path, follow):
        found = look(path, follow)
        owner = next((uid for top, uid in owners.items() if Path(path).resolve().is_relative_to(top)), None)
        return found if owner is None else os.stat_result([*found[:4], owner, *found[5:]])

    def give(path, uid=OTHER):
        if ROOT:
            for one in [path, *(path.rglob("*") if path.is_dir() else [])]:
                os.chown(one, uid, -1, follow_symlinks=False)
        else:
            owners[path.resolve()] = uid
            monkeypatch.setattr(trust, "status", status)

    return give


def checkpoint_of(run):
    return folders.find_latest(run / "checkpoints")


def word_of(run):
    """By an independent program."""
    return subprocess.run(["sha256sum", checkpoint_of(run) / MANIFEST], capture_output=True, text=True, check=True).stdout[:16]


# ---------------------------------------------------------------- whose


def test_what_the_user_has_made_is_ours(run):
    assert of_checkpoint(checkpoint_of(run), Trust()).ours


@pytest.mark.parametrize("what", ["folder", "__0_0.distcp", MANIFEST, ".metadata"])
def test_one_file_of_somebody_elses_makes_it_foreign(run, give, what):
    path = checkpoint_of(run)
    give(path if what == "folder" else path / what)
    with pytest.raises(CheckpointError) as refusal:
        of_checkpoint(path, Trust())
    first, me = path if what == "folder" else path / what, f"{pwd.getpwuid(os.geteuid()).pw_name} (uid {os.geteuid()})"
    assert str(refusal.value) == (
        f"{path} is not yours ({first} belongs to uid {OTHER}, and {me} runs this): its weights, settings and tokenizer would be taken as "
        f"data; nothing in it is ever run; if you trust who made it, say --trust {word_of(run)}"
    )


@pytest.mark.parametrize("mode, who", [(0o757, "by everybody"), (0o775, "by the group staff-of-all")])
def test_what_others_may_write_is_not_ours(run, monkeypatch, mode, who):
    path = checkpoint_of(run)
    path.chmod(mode)
    monkeypatch.setattr(trust, "_private", lambda gid, uid: False)
    monkeypatch.setattr(trust, "_group", lambda gid: "staff-of-all")
    with pytest.raises(CheckpointError, match=f"may be written {who}"):
        of_checkpoint(path, Trust())


def test_a_group_of_ones_own_may_write_it(run, monkeypatch):
    """Umask 002, as on most machines where each user has a group: it is this user's own while nobody else is in it."""
    path = checkpoint_of(run)
    path.chmod(0o775)
    gid = os.stat(path).st_gid
    me = pwd.struct_passwd(("ann", "x", os.geteuid(), gid, "", "", ""))
    monkeypatch.setattr(trust.pwd, "getpwuid", lambda uid: me)
    for name, number, members, ours in (
        ("ann", gid, [], True), ("ann", gid, ["ann"], True), ("ann", gid, ["ann", "eve"], False), ("staff", gid, [], False),
        ("ann", gid + 1, [], False),
    ):  # fmt: skip
        found = grp.struct_group((name, "x", number, members))
        monkeypatch.setattr(trust.grp, "getgrgid", lambda _, found=found: found)
        assert (trust.foreign([path]) == "") == ours, (name, number, members)


def test_roots_files_are_as_good_as_ones_own(run, monkeypatch):
    """Root can do whatever this user can."""
    look = trust.status
    monkeypatch.setattr(trust.os, "geteuid", lambda: 1234)
    monkeypatch.setattr(trust, "status", lambda path, follow: os.stat_result([*look(path, follow)[:4], 0, *look(path, follow)[5:]]))
    assert of_checkpoint(checkpoint_of(run), Trust()).ours


# ---------------------------------------------------------------- trust is in bytes


def test_the_word_lets_these_bytes_in_and_no_others(run, give):
    path, word = checkpoint_of(run), word_of(run)
    give(path)
    verdict = of_checkpoint(path, Trust(words=(word,)))
    assert not verdict.ours and verdict.told.startswith(f"{path} is trusted, as --trust {word} says")
    body = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(body | {"extra": {**body["extra"], "progress": {"step": 2}}}))
    with pytest.raises(CheckpointError, match="is not yours"):
        of_checkpoint(path, Trust(words=(word,)))
    for less in (word[:15], "", word[::-1]):
        with pytest.raises(CheckpointError, match="is not yours"):
            of_checkpoint(path, Trust(words=(less,)))


@pytest.mark.parametrize("digits", ["0123456789012345", "12345678e9012345", "abcdef0123456789", "00e1234567890123"])
def test_the_word_is_text_to_hydra_too(digits):
    """Some hexadecimal digits are a number to it: the refusal names what it takes."""
    said = trust._word(digits)
    assert load([*BASE, f"checkpoint.trust=[{said}]"]).checkpoint.trust == (digits,)
    with pytest.raises(ConfigError, match="16 hexadecimal digits or more"):
        load([*BASE, "checkpoint.trust=[abc]"])


def test_sampling_and_exporting_somebody_elses(run, give, tmp_path):
    """With the tokenizer that its manifest names, and no other."""
    word, said = word_of(run), []
    give(run)
    for use in (lambda **more: sample.load(run, **more), lambda **more: hf.export(run, tmp_path / "hf", **more)):
        with pytest.raises(CheckpointError, match=f"is not yours .* --trust {word}$"):
            use()
        with pytest.raises(CheckpointError, match=r"tokenizer\.json beside it is not the one that this names"):
            use(trust=(word,), log=said.append)  # this run's manifest names none
    assert not (tmp_path / "hf").exists()
    (run / "tokenizer.json").unlink()
    hf.export(run, tmp_path / "hf", trust=(word,), log=said.append)
    assert said and all("is trusted, as" in line for line in said)


def test_a_hugging_face_folder_of_somebody_elses(run, give, tmp_path):
    hf.export(run, tmp_path / "hf", dtype="fp32")
    give(tmp_path / "hf")
    for use in (lambda **more: sample.load(tmp_path / "hf", **more), lambda **more: hf.import_(tmp_path / "hf", tmp_path / "in", **more)):
        with pytest.raises(CheckpointError, match="hf is not yours") as refusal:
            use()
        use(trust=(str(refusal.value).rpartition(" ")[2],), log=lambda line: None)
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="hf is not yours"):
        sample.load(tmp_path / "hf", trust=(str(refusal.value).rpartition(" ")[2],))


def test_files_of_the_hubs_cache_are_links_to_ones_own(run, give, tmp_path):
    hf.export(run, tmp_path / "hf", dtype="fp32")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "hf").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    taken = ("*.json", "*.safetensors")
    assert of_folder(tmp_path / "snapshot", Trust(), taken).ours
    give(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors belongs to uid 4242"):
        of_folder(tmp_path / "snapshot", Trust(), taken)


def test_looking_needs_no_trust(run, give, capsys):
    give(run)
    assert command.verify(run) == exit_codes.OK
    command.show(run)
    assert "whole: 2 files" in capsys.readouterr().out


# ---------------------------------------------------------------- in a run


def session(overrides, world_size=2):
    config = load(overrides)

    def body():
        lines = []
        trainer.run(config, torch.device("cpu"), log=lines.append)
        return lines

    return fork_ranks(world_size, body, timeout_s=60)


def test_a_run_goes_on_from_somebody_elses_only_when_it_is_told_to(tmp_path, give):
    """All ranks hear it from the first; and from then on the checkpoints are the run's own."""
    first = [*BASE, "parallel.edp=2", f"run_dir={tmp_path / 'first'}", f"data.cache_dir={tmp_path / 'cache'}"]
    session([*first, "train.stop_after=2"])
    word = word_of(tmp_path / "first")
    give(tmp_path / "first")
    second = [*BASE, "parallel.edp=2", f"run_dir={tmp_path / 'second'}", f"data.cache_dir={tmp_path / 'cache'}"]
    second += [f"checkpoint.resume={tmp_path / 'first'}"]
    with pytest.raises(RankFailed, match=rf"CheckpointError: .*step_00000002 is not yours .*say checkpoint\.trust=\[\"?{word}\"?\]"):
        session(second)
    with pytest.raises(CheckpointError, match="is not yours"):  # the launcher's first look
        resume.steps_done(load(second))
    assert not (tmp_path / "second").exists()
    assert sample.load(tmp_path / "first", trust=(word,), log=lambda line: None)  # with the tokenizer that its manifest names
    tokenizer = tmp_path / "first" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("endoftext", "end_of_text"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json beside it is not the one"):
        sample.load(tmp_path / "first", trust=(word,), log=lambda line: None)
    told, _ = session([*second, f'checkpoint.trust=["{word}"]'])
    assert sum("step_00000002 is trusted, as checkpoint.trust=" in line for line in told) == 1
    give(tmp_path / "second")  # its own directory: however it came to be somebody else's, nobody is asked
    assert resume.steps_done(load(second)) == 3


# ---------------------------------------------------------------- signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two people's keys, and a file that allows the first."""
    folder = tmp_path_factory.mktemp("keys")
    for who in ("ann", "eve"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", who, "-f", str(folder / who)], check=True)
    (folder / "signers").write_text(f"ann@example.com {(folder / 'ann.pub').read_text()}")
    return folder


def test_a_signature_lets_in_what_ownership_does_not(run, give, keys, capsys):
    assert cli.main(["checkpoint", "sign", str(run), "--key", str(keys / "ann")]) == exit_codes.OK
    path = checkpoint_of(run)
    give(run)
    verdict = of_checkpoint(path, Trust(signers=str(keys / "signers")))
    assert not verdict.ours and verdict.told == f"{path} is signed by ann@example.com, as {keys / 'signers'} allows"
    assert cli.main(["checkpoint", "verify", str(run), "--signers", str(keys / "signers")]) == exit_codes.OK
    assert capsys.readouterr().out.rstrip().endswith("signed by ann@example.com")
    by_hand = ["ssh-keygen", "-Y", "verify", "-f", str(keys / "signers"), "-I", "ann@example.com", "-n", "shoestring-checkpoint"]
    with open(path / MANIFEST, "rb") as manifest:  # as the manual has it
        assert subprocess.run([*by_hand, "-s", str(path / signature.NAME)], stdin=manifest, capture_output=True).returncode == 0


def test_with_signers_nothing_else_counts(run, keys):
    """Not even that it is one's own: a copy of somebody's checkpoint belongs to who has copied it. Nor a word."""
    with pytest.raises(CheckpointError, match=r"is not signed, and checkpoint\.signers asks for a signature"):
        of_checkpoint(checkpoint_of(run), Trust(words=(word_of(run),), signers=str(keys / "signers")))


@pytest.mark.parametrize("how", ["eve", "namespace", "manifest", "rubbish", "pipe", "another's"])
def test_a_signature_that_is_none(run, keys, how, tmp_path):
    path = checkpoint_of(run)
    signature.sign(path, keys / ("eve" if how == "eve" else "ann"))
    if how == "namespace":
        (path / signature.NAME).unlink()
        subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", str(keys / "ann"), "-n", "file", str(path / MANIFEST)], check=True)
    elif how == "manifest":
        (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes() + b" ")
    elif how == "rubbish":
        (path / signature.NAME).write_bytes(b"\0" * 100)
    elif how == "pipe":
        (path / signature.NAME).unlink()
        os.mkfifo(path / signature.NAME)
    elif how == "another's":
        write_run(tmp_path / "other", small(num_layers=1))
        other = signature.sign(checkpoint_of(tmp_path / "other"), keys / "ann")
        shutil.copy(other, path / signature.NAME)
    with pytest.raises(CheckpointError, match=r"is not validly signed for .*signers|is a pipe, where a file should be"):
        of_checkpoint(path, Trust(signers=str(keys / "signers")))
    assert command.verify(run, signers=str(keys / "signers")) == exit_codes.STORAGE


def test_a_damaged_checkpoint_is_not_signed(run, keys):
    weights = checkpoint_of(run) / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(DamagedError):
        signature.sign(checkpoint_of(run), keys / "ann")
    assert not (checkpoint_of(run) / signature.NAME).exists()


def test_a_copy_keeps_it_and_damage_is_set_aside_with_it(run, keys, tmp_path):
    path = checkpoint_of(run)
    signature.sign(path, keys / "ann")
    copy = Path(shutil.copytree(path, tmp_path / "copy" / path.name))
    assert not of_checkpoint(copy, Trust(signers=str(keys / "signers"))).ours
    (copy / "__0_0.distcp").write_bytes(b"")
    assert command.verify(copy, quarantine=True) == exit_codes.STORAGE
    assert (tmp_path / "copy" / f"{path.name}.damaged" / signature.NAME).is_file()
    assert sample.load(run).source == path  # an extra file is nothing to a reader
    folders.remove(path)
    assert not path.exists()


def test_names_that_look_like_options_are_names(run, keys, tmp_path, monkeypatch):
    """Of folders, keys and signers; and a new line in one is no new command."""
    odd = tmp_path / "-oProxyCommand=touch PLANTED\n-x"
    odd.mkdir()
    path = Path(shutil.copytree(checkpoint_of(run), odd / checkpoint_of(run).name))
    shutil.copy(keys / "ann", odd / "-key"), shutil.copy(keys / "signers", odd / "-signers\n")
    monkeypatch.chdir(odd)
    signature.sign(Path(path.name), "-key")
    assert signature.signer(Path(path.name), "-signers\n", (path / MANIFEST).read_bytes()) == "ann@example.com"
    assert not list(tmp_path.rglob("PLANTED"))


def test_without_ssh_keygen_it_is_one_sentence(run, keys, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["checkpoint", "sign", str(run), "--key", str(keys / "ann")]) == exit_codes.STORAGE
    told = capsys.readouterr().err.splitlines()
    assert told == ["error: ssh-keygen is not here, which signs and checks checkpoints: install openssh-client"]
    assert cli.main(["checkpoint", "sign", str(run), "--key", str(keys / "nobody")]) == exit_codes.CONFIG
