"""What the processes of one pool share: bytes, and nothing else. Imported by all of them; it may import kernel, policy, errors and log.

Begin with layout.py, which says what stands where; then slot.py (what a worker writes), board.py (what its supervisor does, with
tenants.py, roll.py and tickets.py) and view.py (what everybody else sees of them).
"""
