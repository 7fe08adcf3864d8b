"""Sampling as plain functions over tensors; parallelism and offload are invisible here."""
