"""What runs in a worker process: a socketpair, prepared requests, one engine."""
