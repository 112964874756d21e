"""Who may come in, and who is next: quotas, bounds on what waits, fair shares."""
