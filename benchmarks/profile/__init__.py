"""`fusion-lm profile`: latency of a token, part by part."""
