"""Stages 1 and 2: files to sentences, sentences to token ids, and batches of them."""
