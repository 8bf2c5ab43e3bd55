"""Policy `incremental`: texts that grow, each token encoded once."""
