"""The only modules that touch kernel files. Every root is a parameter, so that tests can read captured trees.

They run in every process, and may import policy (for its records), errors and log. A file that is missing or makes no sense is None,
never an error. Start with capacity.py (what the kernel allows) and process.py (what a process holds).
"""
