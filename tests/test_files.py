import os
import stat

import pytest

from dlnlab.files import DamagedFileError, read_verified, write_atomic

CONTENT = bytes(range(40)) + b"\nsha256 looks like a trailer"


def previous_of(path):
    return path.with_name(path.name + ".previous")


@pytest.mark.parametrize("content", [b"", b"\n", CONTENT])
def test_what_was_written_is_read(tmp_path, content):
    path = tmp_path / "file"
    write_atomic(path, content, checksum=True)
    assert read_verified(path) == content
    assert path.read_bytes().startswith(content)


def test_without_a_checksum_a_file_holds_its_content_alone(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, CONTENT)
    assert path.read_bytes() == CONTENT
    with pytest.raises(DamagedFileError):
        read_verified(path)


def test_every_flipped_bit_is_detected(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, CONTENT, checksum=True)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DamagedFileError, match="file is damaged"):
                read_verified(path)


def test_every_truncation_and_every_appended_byte_is_detected(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, CONTENT, checksum=True)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFileError):
            read_verified(path)
    for extra in (b"\0", b"\n", whole):
        path.write_bytes(whole + extra)
        with pytest.raises(DamagedFileError):
            read_verified(path)


def test_a_file_that_is_not_there_is_no_damaged_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_verified(tmp_path / "file")


def test_a_replaced_file_is_kept_where_asked_and_only_the_last(tmp_path):
    path = tmp_path / "file"
    for content in (b"one", b"two", b"three"):
        write_atomic(path, content, checksum=True, keep_previous=True)
    assert read_verified(path) == b"three"
    assert read_verified(previous_of(path)) == b"two"
    write_atomic(path, b"four", checksum=True)
    assert read_verified(previous_of(path)) == b"two"
    assert sorted(os.listdir(tmp_path)) == ["file", "file.previous"]


def test_the_kept_file_does_not_change_with_the_new_one(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"one", keep_previous=True)
    write_atomic(path, b"two", keep_previous=True)
    path.write_bytes(b"spoilt")
    assert previous_of(path).read_bytes() == b"one"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "link"])
def test_a_failure_at_any_point_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomic(path, b"old", checksum=True)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, b"new", checksum=True, keep_previous=True)
    assert read_verified(path) == b"old"
    assert set(os.listdir(tmp_path)) <= {"file", "file.previous"}
    write_atomic(path, b"new", checksum=True, keep_previous=True)
    assert read_verified(path) == b"new"
    assert read_verified(previous_of(path)) == b"old"


def test_an_interruption_leaves_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "file"

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert os.listdir(tmp_path) == []


def test_the_file_is_on_disk_before_it_is_in_its_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, original=original: (calls.append(name), original(*args))[1]
        )
    write_atomic(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its place, the folder


def test_others_may_read_the_file(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
