"""Floor 6: speed claims, as ratios to a named peer that is measured in turn, in the same processes
and the same run."""
