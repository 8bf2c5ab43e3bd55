"""The graphs of an export, written node by node."""
