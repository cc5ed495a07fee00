"""Command-line tools: `python -m kmax_d2.tools.NAME`."""
