"""Where things stand in the repository, for tests in whichever folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "programs"  # each runs in a process of its own
