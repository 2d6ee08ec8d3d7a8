"""Random data pipelines: what trains without the planner trains with it, on the same samples.

``python -m benchmarks.pipelines --help`` says how to run them.

``choose.py`` draws a pipeline, ``datasets.py``, ``loaders.py`` and ``training.py`` build it, and ``worker.py`` trains
it on the null GPU. ``supervise.py`` runs such processes, ``verdict.py`` compares a pipeline's runs, ``shrink.py``
finds the smallest one that fails alike, and ``__main__.py`` keeps the rows.
"""
