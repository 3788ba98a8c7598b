"""Metrics, read from the scoreboard.

They are collected in any worker, for the whole pool. It may import scoreboard and the rooms below it, and finds its own pool through the
worker's guard. Start with prometheus.py.
"""
