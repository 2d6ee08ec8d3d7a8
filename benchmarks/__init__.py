"""How exact the predictions are (``benchmarks.accuracy``), and how long planning takes (``benchmarks.speed``)."""
