"""A request in flight: its samples, what they have drawn, who reads it, what is kept for who comes back."""
