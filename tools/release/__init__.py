"""`make release-check`: is what is committed here a release? Builds it, reads it, installs it in an empty
folder and runs the demo there. Knows how packages are made and judged; knows no service.
"""
