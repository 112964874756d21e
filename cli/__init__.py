"""The `weft` command. It knows the public wire (weft.v1) and the size formulas; it loads no model."""
