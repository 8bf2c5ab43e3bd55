"""The clock, the machine and its ceilings, counts of work, and records on disk."""
