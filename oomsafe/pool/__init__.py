"""What the processes of one pool share."""
