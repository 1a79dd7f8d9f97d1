"""One writer for all files: links, devices and pipes, kills, odd names, and the trial of a place."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from w2a4.errors import CheckpointError
from w2a4.format import files

ROOT = os.geteuid() == 0 if hasattr(os, "geteuid") else False


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "real.json").chmod(0o640)
    (tmp_path / "link.json").symlink_to("real.json")
    (tmp_path / "dangling.json").symlink_to("new.json")
    for name in ("link", "dangling"):
        files.write_json(tmp_path / f"{name}.json", {"a": 1})
        assert (tmp_path / f"{name}.json").is_symlink()
    assert json.loads((tmp_path / "real.json").read_text()) == {"a": 1}
    assert stat.S_IMODE((tmp_path / "real.json").stat().st_mode) == 0o640
    assert json.loads((tmp_path / "new.json").read_text()) == {"a": 1}


def test_a_fifo_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    files.try_file(tmp_path / "fifo")  # does not wait for a reader
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_text()), daemon=True)
    reader.start()
    files.write_json(tmp_path / "fifo", {"a": 1})
    reader.join(10)
    assert json.loads(got[0]) == {"a": 1} and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_fifo_that_nobody_reads(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr(files, "_PATIENCE", 0.2)
    with pytest.raises(CheckpointError, match="nobody has read the FIFO"):
        files.write_json(tmp_path / "fifo", {"a": 1})


@pytest.mark.skipif(not ROOT, reason="making a device needs root")
def test_a_device_is_written_to(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        device.open("wb").close()
    except OSError:
        pytest.skip("no devices here")
    files.try_file(device)
    files.write_json(device, {"a": 1})
    assert stat.S_ISCHR(device.stat().st_mode)


def test_standard_output_by_name_keeps_what_was_printed(tmp_path):
    code = (
        "print('first', flush=True); from w2a4.format.files import write_json; "
        "write_json('/dev/stdout', {'a': 1})"
    )
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == 'first\n{\n  "a": 1\n}\n'


def test_names_that_are_long_or_not_utf8(tmp_path):
    long = tmp_path / ("x" * 250 + ".json")
    files.write_json(long, {"a": 1})
    assert json.loads(long.read_text()) == {"a": 1}
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json"))
    files.write_json(odd, {"out": str(odd)})
    assert json.loads(odd.read_text())["out"] == str(odd)
    with pytest.raises(CheckpointError, match="name too long"):
        files.try_file(tmp_path / ("x" * 256))
    assert len(os.fsencode(files.beside(tmp_path / ("x" * 255), "partial").name)) < 255
    assert files.beside(tmp_path / "out", "partial") == tmp_path / ".out.partial"


@pytest.mark.parametrize("at", ["write", "rename"])
def test_a_kill_leaves_the_old_file_and_the_next_write_no_strays(tmp_path, at):
    (tmp_path / "a.json").write_text("old")
    die = "lambda *a: os.kill(os.getpid(), 9)"
    patch = {"write": "pathlib.Path.write_bytes", "rename": "os.replace"}[at]
    write = f"{patch} = {die}; files.write_json('a.json', {{}})"
    code = f"import os, pathlib; from w2a4.format import files; {write}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "a.json").read_text() == "old"
    with files.replacing(tmp_path / "a.json") as first:  # a writer that lives is left alone
        first.write_text("first")
        files.write_json(tmp_path / "a.json", {"second": 1})
        assert first.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "first"


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        files.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)}, {"a": 1})
    with pytest.raises(OSError):
        files.write_json(tmp_path / "no" / "a.json", {})
    assert not list(tmp_path.iterdir())
    files.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2, 3).T})
    assert load_file(tmp_path / "a.safetensors")["a"].shape == (3, 2)


def test_a_place_is_tried(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "a.json", tmp_path / "file" / "a.json", tmp_path):
        with pytest.raises(CheckpointError, match="cannot write"):
            files.try_file(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot write"):
        files.try_file(tmp_path / "loop")
    files.try_file(tmp_path / "new.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"]


def test_small_files_only(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="no regular file"):
        files.read_text(tmp_path / "fifo")
    (tmp_path / "big").write_text("x" * 100)
    with pytest.raises(CheckpointError, match="100 bytes"):
        files.read_text(tmp_path / "big", limit=99)
