"""Folders of predictions."""

import pytest

from kmax_d2.errors import UserError
from kmax_d2.evaluation.output import empty_folder


def test_only_folders_of_earlier_predictions_are_emptied(tmp_path):
    folder = tmp_path / "shapes_val"
    empty_folder(folder)
    (folder / "old.png").touch()
    empty_folder(folder)
    assert list(folder.iterdir()) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "label.png").touch()
    with pytest.raises(UserError, match="mine has files that this program did not write"):
        empty_folder(mine)
    assert (mine / "label.png").exists()
