"""What on this machine decides who dies when memory ends: facts, and what of them is wrong. Pure.

facts.py has the records, which the kernel room and the command line fill; rules.py makes findings of them. Start with rules.py.
"""
