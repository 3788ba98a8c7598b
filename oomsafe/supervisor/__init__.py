"""What runs in a pool's parent process, for all of its workers: which are replaced and when, their limits, and how they died.

This package may import scoreboard, kernel, policy, errors and log, and knows no server. Begin reading with supervisor.py: an adapter
creates a Supervisor in the server's parent process. replacements.py decides for the pool at each tick. No thread is started here, because
the server's loop calls tick(), with one exception: if that loop can't call a watcher every few milliseconds, as in Celery, a WatcherThread
does (watcher.py).
"""
