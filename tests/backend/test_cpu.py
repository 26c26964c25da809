"""Settings that the CPU backend requests from the C library."""

import ctypes
import os

import pytest

from megatron_mopd.backend import cpu


class Library:
    def __init__(self, *_):
        self.asked = []

    def mallopt(self, *arguments):
        self.asked.append(arguments)
        return 1


@pytest.fixture
def library(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    made = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: made)
    return made


def test_freed_memory_is_kept(library):
    cpu._keep_freed_memory()
    assert library.asked == [(-3, 32 << 20), (-1, 1 << 30)]  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def test_the_environment_wins(library, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    cpu._keep_freed_memory()
    assert library.asked == []


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: object())  # musl and macOS have no mallopt
    cpu._keep_freed_memory()
