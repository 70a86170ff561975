"""What task=doctor asks of hosts and links, and what the answers mean for a run."""
