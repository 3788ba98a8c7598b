"""The memory that the processes of one pool share. All of them import this room; it may import kernel, policy, errors and log.

Start with layout.py, which gives the layout of the bytes; then read slot.py (what a worker writes), board.py (what its supervisor does,
with tenants.py, roll.py and tickets.py) and view.py (what other processes read).
"""
