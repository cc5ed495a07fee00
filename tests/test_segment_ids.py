"""Segment ids and their colors."""

import numpy as np

from kmax_d2.data.segment_ids import NUM_IDS, id2rgb, rgb2id


def test_known_colors():
    colors = np.array([[[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [255, 255, 255]]], dtype=np.uint8)
    ids = np.array([[0, 1, 256, 65536, NUM_IDS - 1]], dtype=np.int32)
    assert np.array_equal(rgb2id(colors), ids)
    assert np.array_equal(id2rgb(ids), colors)


def test_small_integers_keep_their_color():
    for dtype in (np.uint8, np.int16):
        assert np.array_equal(id2rgb(np.array([[7]], dtype=dtype)), [[[7, 0, 0]]])
