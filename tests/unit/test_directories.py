"""Directories whole or not at all: mounts, links, kills at every step, and the trial of a place."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.written import fill
from w2a4.cli.options import new_directory
from w2a4.errors import CheckpointError
from w2a4.format import directories
from w2a4.format.directories import COMMIT, atomic_directory, check_out_dir, recover
from w2a4.format.files import beside

OLD = {"config.json": "old", "model-00001-of-00002.safetensors": "old", "notes/mine.txt": "mine"}
NEW = {"config.json": "new", "model.safetensors": "new"}


def contents(directory):
    return {str(p.relative_to(directory)): p.read_text() for p in Path(directory).rglob("*") if p.is_file()}


@pytest.fixture
def mount(tmp_path):
    """An empty file system of its own."""
    target = tmp_path / "mount"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(target)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield target
    subprocess.run(["umount", str(target)], check=True)


def test_an_older_checkpoint_is_replaced_and_other_files_are_kept(tmp_path):
    fill(tmp_path / "out", OLD)
    (tmp_path / "out").chmod(0o700)
    with atomic_directory(tmp_path / "out") as directory, atomic_directory(directory) as inner:
        assert inner == directory
        fill(directory, NEW)
    assert contents(tmp_path / "out") == {**NEW, "notes/mine.txt": "mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (
        tmp_path / "out"
    ).stat().st_mode & 0o777 == 0o700


def test_processes_that_try_one_directory_at_a_time_do_not_fail_each_other(tmp_path):
    """As all processes of one training do, before any of them has made it."""
    errors, directory = [], tmp_path / "a" / "b"

    def try_often():
        try:
            for _ in range(40):
                directories.check_out_dir(directory)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=try_often) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(path.is_dir() for path in tmp_path.rglob("*"))  # of two who make a parent, none may remove it


def test_others_may_read_what_safetensors_wrote(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_directory(tmp_path / "out") as directory:
            fill(directory, NEW)
            (directory / "config.json").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "config.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("system", ["no exchange", "no links"])
def test_where_the_system_cannot_swap(tmp_path, monkeypatch, system):
    def fails(*_):
        raise OSError(1, "not here")

    monkeypatch.setattr(directories, "_exchange", lambda *_: False)
    if system == "no links":
        monkeypatch.setattr(directories, "_link", fails)
    fill(tmp_path / "out", OLD)
    with atomic_directory(tmp_path / "out") as directory:
        fill(directory, NEW)
    assert contents(tmp_path) == {
        f"out/{name}": text for name, text in {**NEW, "notes/mine.txt": "mine"}.items()
    }


def test_a_mount_point(mount):
    check_out_dir(mount)
    (mount / "lost+found").mkdir()
    check_out_dir(mount)
    for _ in range(2):
        with atomic_directory(mount) as directory:
            fill(directory, NEW)
        assert contents(mount) == NEW
    link = mount.parent / "link"
    link.symlink_to(mount / "sub")
    check_out_dir(link)
    with atomic_directory(link) as directory:
        fill(directory, NEW)
    assert contents(link) == NEW and link.is_symlink()


def test_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_out_dir(".")
    with atomic_directory(".") as directory:
        fill(directory, NEW)
    assert contents(".") == NEW  # by the name and through the descriptor of the process
    assert os.path.samefile(".", tmp_path)


WRITER = """
import os, sys
from w2a4.format import directories, files
count, die_at = 0, int(sys.argv[2])
def counted(real):
    def call(*a, **k):
        global count
        count += 1
        if count == die_at:
            os.kill(os.getpid(), 9)
        return real(*a, **k)
    return call
directories._exchange = (lambda *_: False) if sys.argv[3] == "moved" else directories._exchange
for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "link"):
    setattr(os, name, counted(getattr(os, name)))
directories._exchange = counted(directories._exchange)
with directories.atomic_directory(sys.argv[1]) as directory:
    for name in ("config.json", "model.safetensors"):
        (directory / name).write_text("new")
"""


@pytest.mark.parametrize("how", ["swapped", "moved"])
@pytest.mark.parametrize("before", [{}, OLD], ids=["empty", "older"])
def test_a_kill_at_any_step_leaves_old_or_new(tmp_path, how, before):
    seen = set()
    for step in range(1, 60):
        out = tmp_path / str(step) / "out"
        out.mkdir(parents=True)
        fill(out, before)
        done = subprocess.run([sys.executable, "-S", "-c", BARE + WRITER, str(out), str(step), how])
        if how == "moved":
            recover(out)
        found = {name: text for name, text in contents(out).items() if ".w2a4-" not in name}
        kept = {name: text for name, text in before.items() if name.startswith("notes")}
        assert found in (before, {**NEW, **kept}), step
        seen.add(found == before)
        if found == before or not before:
            for name in found:
                (out / name).unlink() if not before else None
            if not before:
                check_out_dir(out)  # what is left is w2a4's own, so that the command can be repeated
        with atomic_directory(out) as directory:
            fill(directory, NEW)
        assert contents(out) == {**NEW, **kept} and [p.name for p in out.parent.iterdir()] == ["out"], step
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0 and step > 3
            break
    assert seen == {True, False}


#: The package without what its __init__ imports, since a process is started for each step.
BARE = f"""
import sys, types
package = types.ModuleType("w2a4"); package.__path__ = [{str(Path(directories.__file__).parents[1])!r}]
sys.modules["w2a4"] = package
"""


def test_a_half_moved_directory_is_told_from_a_whole_one(tmp_path):
    fill(tmp_path / COMMIT, NEW)
    assert directories.is_unfinished(tmp_path)


def test_places_that_are_refused_before_the_work(tmp_path):
    fill(tmp_path, {"file": "", "used/notes.txt": ""})
    (tmp_path / "loop").symlink_to("loop")
    cases = {
        "file": "is a file", "used": "is not empty", "file/out": "cannot write", "loop": "cannot write",
        "x" * 256: "cannot write into.*too long", "new/" + "x" * 256: "too long",
        os.fsdecode(b"\xff"): "not UTF-8",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            check_out_dir(tmp_path / name)
    (tmp_path / "dangling").symlink_to("elsewhere/out")
    for name in ("x" * 255, "deep/er/out", "dangling"):
        check_out_dir(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file", "loop", "used"]


def test_out_by_a_dot_keeps_its_state_beside_and_not_inside(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert new_directory(None, None, Path(".")) == tmp_path / "here"
    assert new_directory(None, None, Path("..")) == tmp_path
    assert new_directory(None, None, Path("out")) == Path("out")
    assert beside(Path("."), "partial") == tmp_path / ".here.partial"
    monkeypatch.setattr(os.path, "ismount", lambda path: True)  # what lies beside a volume may be lost
    assert beside(tmp_path / "here", "partial") == tmp_path / "here" / ".w2a4-partial"
    (tmp_path / "here" / ".w2a4-partial").mkdir()
    check_out_dir(tmp_path / "here")


def test_a_read_only_parent(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    real = directories.sibling_directory

    def refused(target):
        if target.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(target)

    monkeypatch.setattr(directories, "sibling_directory", refused)
    check_out_dir(tmp_path / "out")
    with atomic_directory(tmp_path / "out") as directory:
        fill(directory, NEW)
    assert contents(tmp_path / "out") == NEW
