"""Tells whether a commit made a kernel slower: `python -m bench.gate --base REVISION`; see bench/README.md."""
