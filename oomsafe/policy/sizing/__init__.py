"""How to size a pool, from what is known of it: pure arithmetic. Start with advice.py."""
