"""What to do, as pure functions: no I/O, no clock, no globals. Times and figures come in as arguments."""
