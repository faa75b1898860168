"""Speed, bytes and memory as ratios to the physical floor, beside competitors.

    make bench                                # or: python benchmarks/run.py; 5 to 10 minutes
    python benchmarks/run.py --quick          # whether everything works, in under a minute
    python benchmarks/run.py --only 'quant*'  # some of it
    python benchmarks/run.py --publish        # put the last figures into docs/performance.md

It prints tables and writes results.json, results.md and scaling.png to runs/bench.
"""

import sys

from speed.cli import main

if __name__ == "__main__":
    sys.exit(main())
