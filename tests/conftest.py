"""Test files import `support` and `oracle` from this folder, as the workers' scripts do."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line has it: tests end peers under a question

# A shell starts background jobs with SIGINT ignored, which children inherit; tests send SIGINT and expect it to work.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test fails because the machine is busy: by default, hypothesis limits the time of each example to 200 ms.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
