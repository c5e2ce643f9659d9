"""What was published about real machines in 2023, and what a simulation of them comes to."""
