"""Measure the accuracy of predictions, the time of planning, and whether every kind of training goes on with it."""
