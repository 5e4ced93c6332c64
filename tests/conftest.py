"""Test files import `support` and `oracle` from this folder, as the workers' scripts do."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
