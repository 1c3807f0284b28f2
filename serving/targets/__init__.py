"""Where an endpoint runs: this process, or Ray Serve."""
