"""`fusion-lm bench`: the cases, their baselines, the run and its gate."""
