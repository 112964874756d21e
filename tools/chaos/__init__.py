"""Fault runs: a gateway process, engines behind proxies, faults on a seeded schedule, and clients that check
every token. `python -m tools.chaos --help`.
"""
