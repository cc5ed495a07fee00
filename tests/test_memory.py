"""Freed memory is kept where glibc can do it, and nothing breaks elsewhere."""

import os
import platform

import pytest

from kmax_d2.speed import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_is_kept_unless_turned_off(monkeypatch):
    monkeypatch.delenv("KMAX_D2_KEEP_MEMORY", raising=False)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert keep_freed_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"  # the user's choice
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    assert keep_freed_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("KMAX_D2_KEEP_MEMORY", "0")
    assert not keep_freed_memory()


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.delenv("KMAX_D2_KEEP_MEMORY", raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
