"""Reading times: data, regressions, and the experiment."""
