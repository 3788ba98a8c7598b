"""What runs in a worker: it measures each piece of work, knows the worker's limits, and asks for a replacement.

It may import scoreboard, kernel, policy, errors and log, and knows no server. Start with guard.py: an adapter creates a guard for its
worker. Then read meter.py, through which each piece of work passes.
"""
