"""How a command runs: its help, its config, jobs and sweeps, errors and signals."""
