"""What holds for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# Two cores are shared by the tests, their daemons and their workers: one thread each is the fastest for all.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing of the caller's own daemon may leak into a test.
os.environ.pop("DGN_SOCKET", None)

# A deadline per example measures the machine and not the code.
settings.register_profile("dgn", deadline=None, print_blob=True)
settings.load_profile("dgn")
