"""Speed, as ratios to another library that is measured in turn in the same processes and run."""
