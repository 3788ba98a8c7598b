"""Metrics, read from the scoreboard."""
