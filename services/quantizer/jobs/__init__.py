"""Jobs that outlive the process that runs them: what they are, where they are kept, who runs them."""
