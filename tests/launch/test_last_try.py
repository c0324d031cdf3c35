"""How the last try ended, in `ending.json`: by whom it is written, what it says, and that the next start removes it."""

import pytest
from shoestring.conf.compose import load
from shoestring.launch import elastic, exit_codes, last_try, launcher
from shoestring.launch.cause import Ending
from shoestring.launch.environment import Place


def _noted(run_dir):
    found = last_try.read(run_dir)
    return found and (found.code, found.what, found.again)


def test_what_was_raised_is_noted_and_raised(tmp_path):
    with pytest.raises(FloatingPointError):
        last_try.recorded(tmp_path, lambda: _raise(FloatingPointError("the loss is nan")))
    assert _noted(tmp_path) == (exit_codes.DIVERGED, "the loss is nan", False)
    assert last_try.recorded(tmp_path, lambda: exit_codes.LOST if _noted(tmp_path) is None else 99) == exit_codes.LOST
    assert _noted(tmp_path) == (exit_codes.LOST, exit_codes.MEANING[exit_codes.LOST], False)


def _raise(error):
    raise error


def test_what_the_run_itself_says_stays(tmp_path):
    def run():
        last_try.note(tmp_path, exit_codes.DATA, "no text in a/")
        return exit_codes.DATA

    last_try.recorded(tmp_path, run)
    assert _noted(tmp_path) == (exit_codes.DATA, "no text in a/", False)


def test_a_folder_that_is_gone_ends_nothing(tmp_path):
    assert last_try.recorded(tmp_path / "none", lambda: exit_codes.OK) == exit_codes.OK
    assert last_try.read(tmp_path / "none") is None


def test_the_launcher_says_that_it_will_start_again(tmp_path, monkeypatch, capfd):
    """Two tries, both lost; while it waits before the second, the note says so, and in a try there is none."""
    config = load(["experiment=tiny", f"run_dir={tmp_path}", "launch.device=cpu", "launch.max_restarts=1"])
    seen = []

    def lost(*_, **__):
        seen.append(_noted(tmp_path))
        return Ending(code=exit_codes.LOST, what="rank 1 was killed", logs=tmp_path)

    monkeypatch.setattr(launcher, "_try", lost)
    monkeypatch.setattr(launcher._Forwarding, "sleep", lambda self, seconds: seen.append(_noted(tmp_path)))
    assert launcher.train(config, []) == exit_codes.LOST
    assert seen == [None, (exit_codes.LOST, "rank 1 was killed", True), None]
    assert _noted(tmp_path) == (exit_codes.LOST, "rank 1 was killed", False)


def test_a_job_that_is_refused_leaves_the_other_ones_note(tmp_path, monkeypatch):
    """Whoever has no lease writes nothing."""
    config = load(["experiment=tiny", f"run_dir={tmp_path}", "launch.device=cpu"])
    last_try.note(tmp_path, exit_codes.LOST, "earlier")
    monkeypatch.setattr(launcher.lease, "held", lambda run_dir, **_: _raise(PermissionError("another job trains there")))
    with pytest.raises(PermissionError):
        launcher.train(config, [])
    assert _noted(tmp_path) == (exit_codes.LOST, "earlier", False)


@pytest.mark.parametrize(("rank", "noted"), [(0, exit_codes.DATA), (1, None)])
def test_under_torchrun_the_first_rank_writes_it(tmp_path, monkeypatch, rank, noted):
    config = load(["experiment=tiny", f"run_dir={tmp_path}"])
    for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    code = elastic.run_rank(config, Place(rank=rank, local_rank=rank, world_size=4), lambda *_: exit_codes.DATA, [])
    assert code == exit_codes.DATA and (_noted(tmp_path) or [None])[0] == noted
