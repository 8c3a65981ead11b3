"""Benchmarks: `bench.cpu` and `bench.gpu` check the goals; `bench.suite` is the history that asv keeps."""
