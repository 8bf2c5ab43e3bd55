"""The report of a benchmark run, as a page."""
