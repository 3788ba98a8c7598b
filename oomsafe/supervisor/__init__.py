"""What runs in the parent of a pool, for all of its workers: who is replaced and when, what they may have, what became of them.

It may import scoreboard, kernel, policy, errors and log, and knows no server. Begin with supervisor.py, which is what an adapter makes in
its parent; replacements.py decides for the pool at one tick. It starts no thread: the server's loop calls tick(). One exception is for a
loop that can't call a watcher every few milliseconds, as Celery's can't: a WatcherThread does (watcher.py).
"""
