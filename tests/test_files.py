"""Files are complete or absent."""

import json
import os
import stat

import numpy as np
import pytest
from PIL import Image

from kmax_d2.errors import UserError
from kmax_d2.files import MARK, own_folder, require_own, whole_file, write_json, write_png


def test_a_file_appears_when_it_is_complete(tmp_path):
    file = tmp_path / "new" / "image.png"
    with whole_file(file) as unfinished:
        Image.new("L", (3, 2), 7).save(unfinished)
        assert unfinished.parent == file.parent and unfinished.suffix == ".png"
        assert not file.exists()
    assert Image.open(file).getpixel((1, 1)) == 7
    assert os.listdir(file.parent) == ["image.png"]


def test_an_error_leaves_the_earlier_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, [1])
    with pytest.raises(ZeroDivisionError), whole_file(file) as unfinished:
        unfinished.write_text("[")
        1 / 0  # noqa: B018
    with pytest.raises(TypeError):
        write_json(file, {"not JSON": object()})
    assert json.loads(file.read_text()) == [1]
    assert os.listdir(tmp_path) == ["a.json"]


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"^cannot write .*taken/a\.json: (File exists|Not a directory)$"):
        write_json(tmp_path / "taken" / "a.json", [])
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"^cannot write .*folder\.json: Is a directory$"):
        write_json(tmp_path / "folder.json", [])
    with pytest.raises(UserError, match=r"^cannot write .*folder\.json: Is a directory$"):
        write_png(tmp_path / "folder.json", np.zeros((2, 2, 3), np.uint8))
    assert sorted(os.listdir(tmp_path)) == ["folder.json", "taken"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="No such file"), whole_file(tmp_path / "a.txt"):
        pass


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_json(tmp_path / "a.json", [])
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_only_files_of_the_project_are_its_own(tmp_path):
    own, users = tmp_path / "own.png", tmp_path / "users.png"
    write_png(own, np.zeros((300, 300), np.uint8), title="x")
    Image.open(own).save(users)
    write_json(tmp_path / "own.json", {"info": {"description": MARK}, "images": []})
    require_own([own, tmp_path / "own.json", tmp_path / "absent.png"])
    with pytest.raises(UserError, match=r"users\.png exists and was not made by kmax_d2: .*--overwrite"):
        require_own([own, users])
    require_own([users], overwrite=True)
    with pytest.raises(UserError, match=r"cannot read "):
        require_own([tmp_path])
    assert Image.open(own).text == {"Comment": MARK, "title": "x"}


def test_a_folder_with_other_files_is_not_claimed(tmp_path):
    assert own_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "new" / "result").touch()
    own_folder(tmp_path / "new")
    with pytest.raises(UserError, match="is not empty and was not made by kmax_d2: choose another folder"):
        own_folder(tmp_path)
