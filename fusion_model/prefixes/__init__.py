"""Stages 3 to 5: what an encoder is shown at each position, planned, encoded once, and stored."""
