"""What is free goes back to the system, but not at every step."""

import ctypes
import platform

import pytest

from revjax.training import host_memory


def resident_mb() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1e3 for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told to give back")
def test_holes_between_what_is_in_use_go_back_to_the_system():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    size = 64 * 1024  # below what malloc maps by itself
    blocks = [libc.malloc(size) for _ in range(3000)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for i, block in enumerate(blocks):
        if i % 2:  # every other one: none of the holes is at the end
            libc.free(block)
    before = resident_mb()
    host_memory.give_back()
    after = resident_mb()
    for block in blocks[::2]:
        libc.free(block)
    assert before - after > 0.8 * 1500 * size / 1e6  # all but the ends of the holes, which share their pages


def test_it_gives_back_at_intervals(monkeypatch):
    now, given_back = [100.0], []
    monkeypatch.setattr(host_memory.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(host_memory, "give_back", lambda: given_back.append(now[0]))
    memory = host_memory.HostMemory(every_s=10)
    for now[0] in (100.0, 109.0, 110.0, 111.0, 119.9, 125.0):
        memory.give_back_in_time()
    assert given_back == [110.0, 125.0]
