"""Files in run directories: what is planted there is neither written through nor waited for, and what users do every day goes on."""

import os
import pickle
import stat

import pytest
from shoestring.conf import files
from shoestring.conf.files import UnsafeFile


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "elsewhere" / "bashrc"
    path.parent.mkdir()
    path.write_text("mine\n")
    return path


def plant(kind, victim, path):
    if kind == "symlink":
        path.symlink_to(victim)
    elif kind == "dangling":
        victim.unlink()
        path.symlink_to(victim)
    elif kind == "hard link":
        os.link(victim, path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize("mode", ["a", "ab", "ab+", "rb+", "wb"])
@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "pipe", "folder"])
def test_nothing_is_written_through_a_trick(victim, tmp_path, kind, mode):
    plant(kind, victim, tmp_path / "metrics.jsonl")
    with pytest.raises(UnsafeFile, match=r"metrics\.jsonl (is a (symbolic link|pipe|folder), where a file should be|has a second name)"):
        files.opened(tmp_path / "metrics.jsonl", mode)
    assert victim.read_text() == "mine\n" if victim.exists() else kind == "dangling"


@pytest.mark.parametrize("kind", ["symlink", "dangling", "hard link", "pipe"])
@pytest.mark.parametrize("write", [lambda path: files.replace(path, "new"), lambda path: files.fresh(path).write(b"new")])
@pytest.mark.parametrize("planted", ["config.yaml", "config.yaml.tmp"])
def test_a_new_file_takes_the_place_of_a_trick(victim, tmp_path, kind, write, planted):
    plant(kind, victim, tmp_path / planted)
    write(tmp_path / "config.yaml")
    found = os.lstat(tmp_path / "config.yaml")
    assert stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    assert victim.read_text() == "mine\n" if victim.exists() else kind == "dangling"


@pytest.mark.parametrize("kind", ["symlink", "pipe", "folder"])
def test_nothing_is_read_through_a_trick(victim, tmp_path, kind):
    plant(kind, victim, tmp_path / "lease.json")
    with pytest.raises(UnsafeFile, match="where a file should be"):
        files.read(tmp_path / "lease.json")
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "nothing")


def test_ordinary_files_are_as_with_open(tmp_path):
    with files.opened(tmp_path / "a", "a", encoding="utf-8") as file:
        file.write("één\n")
    with files.opened(tmp_path / "a", "ab+") as file:
        assert file.tell() == 6 and file.write(b"two\n")
    assert files.read(tmp_path / "a") == "één\ntwo\n".encode() and files.read(tmp_path / "a", 2) == "é".encode()
    with files.opened(tmp_path / "a", "rb+") as file:
        file.write(b"E")
        assert os.get_blocking(file.fileno())
    with files.opened(tmp_path / "a", "wb") as file:
        file.write(b"3")
    assert (tmp_path / "a").read_text() == "3"
    files.replace(tmp_path / "a", "4")
    assert (tmp_path / "a").read_text() == "4" and sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_permissions_are_the_users_and_private_ones_are_private(tmp_path):
    before = os.umask(0o027)
    try:
        files.fresh(tmp_path / "open").close(), files.fresh(tmp_path / "closed", private=True).close()
    finally:
        os.umask(before)
    assert [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in ("open", "closed")] == [0o640, 0o600]


def test_the_run_directory_may_be_a_link_and_what_is_in_it_may_not(victim, tmp_path):
    disk = tmp_path / "big"
    disk.mkdir()
    (tmp_path / "runs").symlink_to(disk)
    assert files.folder(tmp_path / "runs" / "a", "logs", "1").is_dir() and (disk / "a" / "logs" / "1").is_dir()
    (disk / "a" / "flight").symlink_to(victim.parent)
    with pytest.raises(UnsafeFile, match="flight is a symbolic link, and nothing is written through one: let the run directory itself"):
        files.folder(tmp_path / "runs" / "a", "flight", "1")
    assert os.listdir(victim.parent) == ["bashrc"]


def test_removing_takes_the_link_and_leaves_what_it_led_to(victim, tmp_path):
    (tmp_path / ".step_00000001.partial").symlink_to(victim.parent)
    files.remove_tree(tmp_path / ".step_00000001.partial")
    assert victim.read_text() == "mine\n" and not os.path.lexists(tmp_path / ".step_00000001.partial")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(UnsafeFile(40, "is a pipe, where a file should be", "/a/b")))
    assert (type(error), str(error)) == (UnsafeFile, "/a/b is a pipe, where a file should be")
