"""Names that options take, where nothing is imported for them."""

LATE = ("concat", "add", "multiply", "gate")
EARLY = ("init_hidden", "init_cell", "init_both")
FUSIONS = ("none", *LATE[:3], *EARLY, "input", "gate")
