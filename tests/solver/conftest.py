"""Makes `tests/tiny_pipelines.py`, which several folders of tests share, importable by its name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
