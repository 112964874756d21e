"""Generated from protos/weft/v1; never edited."""
