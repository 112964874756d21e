"""Which engine a sample goes to, and where it goes on when that engine is lost."""
