"""The benchmark suite: `python -m bench` measures, `python -m bench.figures` compares with the project's targets."""
