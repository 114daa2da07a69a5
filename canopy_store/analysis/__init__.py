"""Statistics: selections of rollouts, controlled comparisons, power, regressions."""
