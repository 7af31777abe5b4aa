"""Tensor parallelism: shards, sums over ranks."""
