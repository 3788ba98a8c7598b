"""Metrics, read from the scoreboard.

In whichever worker is asked, for the whole pool. It may import scoreboard and what is below, and finds its own pool by worker's guard.
Begin with prometheus.py.
"""
