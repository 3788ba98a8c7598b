"""A kombu that can't be told how often to look for messages that are due again looks every 100 s: at each tenth of its turns, of 10 s each.

With this imported, it looks at each. A newer one is told, and does not read this default.
"""

from kombu.transport.redis import QoS

assert QoS.restore_visible.__code__.co_varnames[:4] == ("self", "start", "num", "interval")
QoS.restore_visible.__defaults__ = (0, 10, 1)
