"""Measure the accuracy of predictions (``benchmarks.accuracy``) and the time of planning (``benchmarks.speed``)."""
