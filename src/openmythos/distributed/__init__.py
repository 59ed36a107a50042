"""Many processes: ranks and what they agree on, sharded weights, expert parallelism."""
