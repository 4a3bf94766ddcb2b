"""Makes `tests/tiny_flux.py` importable by its name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
