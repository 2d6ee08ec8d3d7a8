"""Trainings that run without the planner: they run with it, and no sample is lost.

``python -m benchmarks.robustness --help`` says how to run them.

``jobs/`` has one small function a job, by theme. ``job.py`` is what they share, ``worker.py`` runs jobs in a process on
the null GPU, ``supervise.py`` watches such processes, ``verdict.py`` compares a job's runs, ``__main__.py`` keeps the
rows and prints the table.
"""
