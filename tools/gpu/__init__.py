"""The device lane: kernel tests, model parity and benchmarks on a GPU, by one script; it installs nothing."""
