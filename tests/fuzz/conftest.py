import sys
from pathlib import Path

# The messages that the tests of the wire format draw.
sys.path.append(str(Path(__file__).parents[1] / "wire"))
