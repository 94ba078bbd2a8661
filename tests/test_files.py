"""The atomic writers: what a reader finds after any end of a writer, and what is left on the disk."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from ood_fast import files
from ood_fast.files import BusyError, locked, replacing, settle, staged, write_text


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "a.csv"
    with replacing(out) as part:
        part.write_text("new")
        assert part.parent == tmp_path
        assert not out.exists()
    assert out.read_text() == "new"
    assert names(tmp_path) == ["a.csv"]
    write_text(out, "ä\n")
    assert out.read_bytes() == "ä\n".encode()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    out = tmp_path / "a"
    out.write_text("old")
    with pytest.raises(error), replacing(out) as part:  # noqa: PT012
        part.write_text("half")
        raise error
    assert out.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_permissions_are_those_of_the_file_or_of_any_new_one(tmp_path):
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    plain.touch()
    kept.touch()
    kept.chmod(0o640)
    for out in (tmp_path / "new", kept):
        with replacing(out) as part:
            part.unlink()  # a writer that makes a private file of its own, as safetensors'
            part.touch(mode=0o600)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"plain": modes["plain"], "new": modes["plain"], "kept": 0o640}


def test_of_a_link_the_file_that_it_names_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, dangling = tmp_path / "there/data", tmp_path / "link", tmp_path / "dangling"
    target.write_text("old")
    link.symlink_to(target)
    dangling.symlink_to("there/later")
    write_text(link, "new")
    write_text(dangling, "made")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert (tmp_path / "there/later").read_text() == "made"
    assert names(tmp_path / "there") == ["data", "later"]


def test_a_pipe_is_written_as_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join()
    assert read == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=f"cannot write {tmp_path}"), replacing(tmp_path):
        raise AssertionError("a folder")
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/no/such: No such file") as caught:
        write_text(tmp_path / "no/such", "text")
    assert caught.value.errno == errno.ENOENT


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    out = tmp_path / "a"
    out.write_text("old")
    with pytest.raises(OSError, match=f"cannot write {out}: No space left") as caught, replacing(out), \
         open("/dev/full", "w") as file:  # fmt: skip
        file.write("x" * 10)
    assert caught.value.errno == errno.ENOSPC
    assert out.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_an_error_of_another_file_keeps_its_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(tmp_path / "a"):
        open(tmp_path / "elsewhere")  # noqa: SIM115
    assert names(tmp_path) == []


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("n" * 255, "é" * 127):
        write_text(tmp_path / name, "text")
    assert len(names(tmp_path)) == 2


def test_writers_at_once_each_write_all(tmp_path):
    out = tmp_path / "a"
    texts = [str(number) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(out, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out.read_text() in texts
    assert names(tmp_path) == ["a"]


KILLED = """
import os, signal, sys
from ood_fast.files import replacing, staged
with {writer}(sys.argv[1]) as part:
    (part / "x" if part.is_dir() else part).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(tmp_path, writer, out):
    done = subprocess.run([sys.executable, "-c", KILLED.format(writer=writer), str(out)], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path):
    out, other = tmp_path / "a", tmp_path / "a.b"
    killed(tmp_path, "replacing", out)
    killed(tmp_path, "replacing", other)
    assert len(names(tmp_path)) == 2
    assert not out.exists()
    write_text(out, "whole")
    assert len(names(tmp_path)) == 2  # that of `a.b` is not touched
    write_text(other, "whole")
    assert names(tmp_path) == ["a", "a.b"]


def test_what_may_still_be_written_stays(tmp_path):
    living = tmp_path / f".a.{files._HOST}-{os.getppid()}-0.part"
    elsewhere, long_ago = tmp_path / ".a.0badcafe-1-0.part", tmp_path / ".a.0badcafe-2-0.part"
    own = tmp_path / ".a.part"
    for part in (living, elsewhere, long_ago, own):
        part.touch()
    os.utime(long_ago, (time.time() - 2 * files.ABANDONED,) * 2)
    with replacing(tmp_path / "a"), replacing(tmp_path / "a"):
        pass
    assert names(tmp_path) == sorted(["a", living.name, elsewhere.name, own.name])


# ---- folders


def test_a_folder_takes_its_place_when_all_is_whole(tmp_path):
    folder = tmp_path / "deep/results"
    with staged(folder) as staging:
        (staging / "scores").mkdir()
        (staging / "scores/a").write_text("1")
        (staging / "b").write_text("1")
    assert names(folder) == ["b", "scores"]
    (folder / "mine").write_text("stays")
    (folder / "scores/old").write_text("goes with the folder")
    with staged(folder) as staging:
        (staging / "scores").mkdir()
        (staging / "scores/a").write_text("2")
        (staging / "b").write_text("2")
        assert (folder / "b").read_text() == "1"
    assert names(folder) == ["b", "mine", "scores"]
    assert names(folder / "scores") == ["a"]
    assert (folder / "b").read_text() == (folder / "scores/a").read_text() == "2"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_a_folder_is_as_before(tmp_path, error):
    with pytest.raises(error), staged(tmp_path / "a/b") as staging:  # noqa: PT012
        (staging / "x").write_text("half")
        raise error
    assert names(tmp_path) == []
    write_text(tmp_path / "x", "old")
    with pytest.raises(error), staged(tmp_path) as staging:  # noqa: PT012
        (staging / "x").write_text("half")
        raise error
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_kill_before_the_folder_is_whole_changes_nothing(tmp_path):
    write_text(tmp_path / "x", "old")
    killed(tmp_path, "staged", tmp_path)
    settle(tmp_path)
    assert (tmp_path / "x").read_text() == "old"
    assert len(names(tmp_path)) == 2
    with staged(tmp_path) as staging:
        (staging / "y").write_text("new")
    assert names(tmp_path) == ["x", "y"]


KILLED_WHILE_MOVING = """
import os, signal, sys
from ood_fast import files
steps, replace = int(sys.argv[2]), os.replace
def counted(*paths):
    global steps
    if steps == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    steps -= 1
    replace(*paths)
os.replace = counted
with files.staged(sys.argv[1]) as staging:
    for name in ("d", "e"):
        (staging / name).mkdir()
        (staging / name / "x").write_text("new")
    (staging / "results.json").write_text("new")
"""


@pytest.mark.parametrize("steps", range(1, 6))
@pytest.mark.parametrize("reader", ["settle", "staged"])
def test_a_kill_between_any_two_renames_is_completed(tmp_path, steps, reader):
    for name in ("d", "e"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("old")
    (tmp_path / "results.json").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_MOVING, str(tmp_path), str(steps)])
    assert done.returncode == -signal.SIGKILL
    if reader == "settle":
        settle(tmp_path)
    else:
        with staged(tmp_path) as staging:
            (staging / "later").touch()
        (tmp_path / "later").unlink()
    assert names(tmp_path) == ["d", "e", "results.json"]
    assert {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {
        "x": "new",
        "results.json": "new",
    }


def test_an_interruption_while_moving_finishes_first(tmp_path, monkeypatch):
    calls = []

    def interrupted(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(*paths)

    replace = os.replace
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path) as staging:  # noqa: PT012
        for name in "abc":
            (staging / name).touch()
    assert names(tmp_path) == ["a", "b", "c"]


# ---- locks


def test_a_second_process_waits_or_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    code = "import sys, time; from ood_fast.files import locked\n"
    code += "with locked(sys.argv[1]): print('in', flush=True); time.sleep(1.5)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(BusyError, match="another process"), locked(tmp_path, wait=0.1):
            raise AssertionError("both inside")
        with locked(tmp_path, wait=None):
            assert other.wait(10) == 0
