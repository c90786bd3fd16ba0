"""What a fit will need, reckoned from its settings before anything is loaded: memory, arithmetic, disk space."""
