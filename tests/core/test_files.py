"""A file is complete or as it was before."""

import os

import pytest

from jdl.core.files import atomic_file, write_atomically


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_file_has_the_permissions_of_the_umask_and_keeps_those_it_has(tmp_path, umask):
    before = os.umask(umask)
    try:
        for _ in range(2):
            write_atomically(tmp_path / "new", "text")
            assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~umask
            os.umask(0o022)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "file"
    write_atomically(path, "before")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines([b"after", None])
    assert path.read_text() == "before"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
