import sys
from pathlib import Path

# Behind everything else: benchmarks/ has modules of common names.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
