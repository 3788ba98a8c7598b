"""What runs in the parent of a pool, for all of its workers: who is replaced and when, what they may have, what became of them.

It may import scoreboard, kernel, policy, errors and log, and knows no server. Begin with supervisor.py, which is what an adapter makes in
its parent; replacements.py is one look at the pool. No thread of its own: the server's loop calls tick().
"""
