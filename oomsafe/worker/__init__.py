"""What runs in a worker, for itself: it measures each piece of work, knows its limits, and asks to be replaced.

It may import scoreboard, kernel, policy, errors and log, and knows no server. Begin with guard.py, which is what an adapter makes for its
worker; meter.py is what each piece of work passes through.
"""
