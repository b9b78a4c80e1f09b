"""The tiny task's files are imported by name from configs, as a user's own modules would be."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
