"""Inference spread over processes and machines: corpus jobs on a process pool or on Ray."""

from lmopt.scaling.job import BatchResult, batch

__all__ = ["BatchResult", "batch"]
