"""Ratios against a limit or a peer, measured in one run; start with ``python -m bench.NAME`` in the checkout."""
