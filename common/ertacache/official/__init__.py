"""What the models' own packages need: runs that several processes share, and loops that make their scheduler inside."""
