"""The OOM killer's reports in a log of any kind: bytes in, events out. Pure: no file is read here, and nothing is printed.

Three stages, one file each, joined in reader.py:

- undress.py takes the prefix off: ``Nov 20 17:00:06 host kernel: [ 1740.788324] Out of memory: …`` becomes a message and its time.
- messages.py says what a message is: the header, a limit, a row of the table, ``Killed process …``.
- assemble.py puts messages together to events, which record.py describes.

Its input is hostile: each line is bounded, and so are the number of open events and the length of a table; the time is linear.
"""
