"""A file that is written whole: what stands there before, after, and when the writer fails."""

import os
from pathlib import Path

import pytest

from pagemill.files import written_whole


@pytest.fixture
def synced(monkeypatch):
    """What was done to make it last, in order; files by their size at that time."""
    done = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(fd):
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else os.fstat(fd).st_size)
        fsync(fd)

    def note_replace(old, new):
        done.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return done


@pytest.mark.parametrize("by", ["writing", "replacing"])
def test_is_renamed_when_it_is_on_disk_and_its_folder_after_it(tmp_path, synced, by):
    path = tmp_path / ("ä" * 120)  # 240 of the 255 bytes that a name may have
    path.write_text("old")
    umask = os.umask(0o027)
    try:
        with written_whole(path) as beside:
            assert beside.parent == tmp_path
            assert beside.read_bytes() == b""
            if by == "replacing":  # as safetensors does, with a mode of its own
                (tmp_path / "other").touch(mode=0o600)
                (tmp_path / "other").rename(beside)
            beside.write_text("new text")
            assert path.read_text() == "old"
    finally:
        os.umask(umask)
    assert path.read_text() == "new text"
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == [path.name]
    assert synced == [8, "rename", "folder"]


def fail(file, error):
    file.write_text("half")
    raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_writer_that_fails_changes_nothing(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), written_whole(path) as beside:
        fail(beside, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["", ".", "folder", "missing/file"])
def test_a_name_that_no_file_can_have_is_an_error_of_the_system(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(OSError), written_whole(Path(name)) as beside:
        beside.write_text("text")
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir("folder") == []
