"""What to do, as pure functions: no I/O, no clock, no globals. Times and figures come in as arguments.

Run in every process; they import errors, and nothing else of ours. Begin with recycle.py, which is the product in one function; then
replace.py (who of a pool goes, and when), limits.py and settings.py.
"""
