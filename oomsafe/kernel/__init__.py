"""The only modules that touch kernel files. Every root can be given, so that tests read captured trees.

Run in every process. They may import policy (for its records), errors and log. A file that is not there, or makes no sense, is None, and
never an error. Begin with capacity.py (what the kernel allows) and process.py (what a process has).
"""
