"""What to do, as pure functions: no I/O, no clock, no globals. Times and figures come in as arguments.

They run in every process, and import only oomsafe.errors. Start with recycle.py, which is the product in one function; then read
replace.py (which worker of a pool leaves, and when), limits.py and settings.py.
"""
