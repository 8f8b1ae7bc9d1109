"""What the cases are held against: the obvious way to write the same thing."""
