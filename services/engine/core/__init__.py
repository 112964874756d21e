"""The pure core: sequences, blocks, scheduling. Standard library only."""
