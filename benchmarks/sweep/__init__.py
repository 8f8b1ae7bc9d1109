"""Many cases in one run within a budget of time: plans, their file, their table."""
