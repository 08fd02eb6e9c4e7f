"""`python -m dgnd.worker FD NOTE_FD PARENT_PID LOG_LEVEL`: started by dgnd only."""

from __future__ import annotations

import os
import sys

from dgnd.worker.process import main

# Plugins may leave threads behind that would keep the interpreter from ending.
os._exit(main(sys.argv[1:]))
