"""Makes importable by name what several folders of tests share, and the scripts at the root."""

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "data"), str(TESTS.parent)]
