import sys
from pathlib import Path

# The benchmarks are scripts that import each other by name.
sys.path.append(str(Path(__file__).parent))
