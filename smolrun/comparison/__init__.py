"""Runs side by side: what was different about them, what came out, and how sure that is.

Reads run folders, which anybody may have written, as data: nothing in them is executed.
"""

from smolrun.comparison.compare import compare_runs as compare_runs
from smolrun.comparison.compare import compare_sweep as compare_sweep
